"""The artifact of a name, path or preset.

A published artifact that is not here yet is downloaded; on a terminal a preset is offered to be exported.
"""

from __future__ import annotations

import sys
from pathlib import Path

from normistral.artifact import store
from normistral.artifact.extra_files import parse_published
from normistral.artifact.presets import Preset, find_preset
from normistral.commands.console import confirm, is_terminal, say
from normistral.commands.progress import show_progress
from normistral.commands.translate import translate
from normistral.errors import MissingExtraError, ModelNotFoundError
from normistral.progress import format_bytes

_STORED_BYTES = 2  # of a parameter in a published checkpoint: bfloat16


def find(name: str) -> Path:
    """The artifact of this name, path or preset; a published one (OWNER/NAME) is downloaded if it is not here.

    Raises:
        NormistralError: as `find_or_download`.
    """
    try:
        return store.resolve_artifact(name)
    except ModelNotFoundError:
        if parse_published(name) is None:
            raise
    from normistral.artifact.download import find_or_download

    with show_progress() as progress:
        return find_or_download(name, progress)


def find_or_make(name: str | None) -> Path:
    """The artifact of this name, path or preset, as `find` does; without a name the only one, or else the demo's.

    Raises:
        ModelNotFoundError: there is none, and nobody is there to be asked, or the offer was declined.
        NormistralError: as `export_model`.
    """
    try:
        return store.default_artifact() if name is None else find(name)
    except ModelNotFoundError as missing:
        preset = find_preset("demo" if name is None else name)
        if preset is None or (name is None and store.list_artifacts()):
            raise
        if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
            raise
        return _offer(preset, missing)


def _offer(preset: Preset, missing: ModelNotFoundError) -> Path:
    from normistral.export.tools import find_export_tools

    try:
        find_export_tools("openvino")
    except MissingExtraError as exc:
        raise MissingExtraError(f"{missing.message}, and making one needs more: {exc.message}", exc.hint) from exc
    say(translate(f"{preset.name} is not on this machine yet.") + " " + translate(_describe_cost(preset)))
    if not confirm("Make it now?", default=True):
        raise ModelNotFoundError(missing.message, f"make it later with: {preset.export_command}") from missing
    from normistral.export.pipeline import export_model

    folder = store.default_output(preset.name, preset.weights, "openvino")
    with show_progress() as progress:
        export_model(preset.name, folder, "openvino", preset.weights, progress=progress, recipe=preset.recipe)
    return folder


def _describe_cost(preset: Preset) -> str:
    """Download size and time of an export, in words."""
    if preset.repository is None:
        return f"It can be made from the package {preset.package}, which takes about a minute."
    if preset.parameters is None:
        return f"Making it downloads {preset.repository} and takes up to an hour; then it starts in seconds."
    size, source = _STORED_BYTES * preset.parameters, preset.repository
    return f"Making it downloads {format_bytes(size)} from {source} and takes up to an hour; then it starts in seconds."
