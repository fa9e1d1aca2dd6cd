"""The errors a user can meet.

    NormistralError                 exit code 1; every one has a message and a hint that says what to do next
    ├── UsageError                  a wrong option or argument (exit code 2)
    ├── ModelNotFoundError          no such preset, artifact, folder or repository
    ├── DownloadError               the hub could not be reached, refused, or sent the wrong bytes
    ├── PublishError                the hub could not be reached, or did not take what was sent
    ├── CheckpointError             the model to be exported is damaged, incomplete or inconsistent
    │   └── UnsupportedArchitectureError
    ├── ExportError                 the conversion failed
    ├── ResourceError               too little disk or memory, with the numbers
    ├── MissingExtraError           a package of an optional extra is not installed
    ├── ArtifactError               an exported artifact is missing a file, damaged, or from a newer version
    ├── SessionError                a saved session is damaged, or of another artifact or other settings
    ├── TemplateError               the chat template cannot be rendered, or not safely
    ├── ContextLengthError          the input does not fit the model's context
    ├── DeviceError                 the asked-for device or provider is not there
    ├── EngineError                 the inference engine failed
    ├── BusyError                   the model or chat is already generating
    └── ClosedError                 the model was closed

It knows no other module of the package. Engines and tools raise their own exceptions; the file that calls them
translates those with `raise ... from exc`.
"""

from __future__ import annotations

from typing import ClassVar


class NormistralError(Exception):
    """Base of all errors here.

    Args:
        message: what went wrong, with the values, in one line.
        hint: what to do next, in one line; empty when there is nothing to say.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def first_line(exc: BaseException) -> str:
    """First line of another package's exception, for a one-line message."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0] if lines else type(exc).__name__


class UsageError(NormistralError):
    """A wrong option or argument."""

    exit_code = 2


class ModelNotFoundError(NormistralError):
    """No such preset, artifact, folder or repository."""


class DownloadError(NormistralError):
    """The hub could not be reached, refused, or sent the wrong bytes."""


class PublishError(NormistralError):
    """The hub could not be reached, or did not take what was sent."""


class CheckpointError(NormistralError):
    """The checkpoint to be exported is damaged, incomplete or inconsistent."""


class UnsupportedArchitectureError(CheckpointError):
    """The checkpoint is whole, but of an architecture this package does not export."""


class ExportError(NormistralError):
    """The conversion failed."""


class ResourceError(NormistralError):
    """Too little disk or memory; the message carries the numbers."""


class MissingExtraError(NormistralError):
    """A package of an optional extra is not installed."""


class ArtifactError(NormistralError):
    """An exported artifact is missing a file, damaged, or from a newer version."""


class SessionError(NormistralError):
    """A saved session is damaged, from a newer version, or of another artifact or other settings."""


class TemplateError(NormistralError):
    """The chat template cannot be rendered, or not safely."""


class ContextLengthError(NormistralError):
    """The input does not fit the model's context."""


class DeviceError(NormistralError):
    """The asked-for device or execution provider is not there."""


class EngineError(NormistralError):
    """The inference engine failed."""


class BusyError(NormistralError):
    """The model or chat is already generating in another call."""


class ClosedError(NormistralError):
    """The model was closed."""

    def __init__(self, message: str = "the model was closed", hint: str = "load it again") -> None:
        super().__init__(message, hint)


# Hints of several errors. This package is on no package index yet: a release is a wheel file, or a checkout. pip adds
# an extra to an installed package by the package's name all the same.

EXPORT_AGAIN = "export, copy or download it again (normistral rm NAME removes it)"
SOURCE = "a wheel's file, or . in a checkout"
UPGRADE = f"install a newer normistral: pip install --upgrade SOURCE, which is {SOURCE}"
REINSTALL = f"install it again: pip install --force-reinstall --no-deps SOURCE, which is {SOURCE}"


def install_extra(*names: str) -> str:
    """The command that adds extras to an installed normistral."""
    return f'pip install "normistral[{",".join(names)}]"'
