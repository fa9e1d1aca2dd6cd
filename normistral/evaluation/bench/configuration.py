"""What is measured beside each other: an artifact with settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.errors import UsageError
from normistral.runtime.engines.settings import parse_settings

_THREADS = ("INFERENCE_NUM_THREADS", "intra_op_num_threads")  # OpenVINO's name, onnxruntime's
_WEIGHT_FILES = {"openvino": "openvino_model.", "onnx": "model.onnx"}
_EMBEDDING_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 1}  # an element; scales are a few per cent more
_CACHE_ELEMENT_BYTES = 4  # float32, the most that an engine takes


@dataclass(frozen=True, slots=True)
class Configuration:
    """One row of the comparison.

    Attributes:
        label: how tables call it.
        settings: of the engine, over its plan for this machine.
    """

    label: str
    folder: Path
    manifest: Manifest
    device: str = "CPU"
    exact: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: all but an input embedding that is not the output layer too.

        Of such an embedding a token reads one row.
        """
        prefix, shape = _WEIGHT_FILES[self.manifest.format], self.manifest.architecture
        stored = sum(record.size for name, record in self.manifest.files.items() if name.startswith(prefix))
        element = 2 if self.manifest.recipe.backup == "fp" else _EMBEDDING_BYTES[self.manifest.recipe.weights]
        unread = 0 if shape.tied_embeddings else shape.vocabulary * shape.hidden_size * element
        return max(0, stored - unread)

    def least_bytes(self, tokens: int) -> int:
        """Memory without which it cannot run: the weights once, and a KV cache for so many tokens."""
        shape = self.manifest.architecture
        cached = 2 * shape.layers * shape.kv_heads * shape.head_dim * _CACHE_ELEMENT_BYTES * tokens
        return self.manifest.total_bytes + cached

    def likely_bytes(self, tokens: int) -> int:
        """Memory it takes at most: the engines keep the mapped file beside weights in an order of their own."""
        return self.least_bytes(tokens) + self.manifest.total_bytes


def read_configurations(
    arguments: Sequence[str], shared: Mapping[str, str], device: str, *, exact: bool
) -> list[Configuration]:
    """The configurations that a command line names.

    Args:
        arguments: ARTIFACT, or ARTIFACT@KEY=VALUE,KEY=VALUE.
        shared: settings of all of them; those of a single one come first.

    Raises:
        UsageError: settings that cannot be read, or the same configuration twice.
        NormistralError: an artifact is not there, or damaged.
    """
    found: list[Configuration] = []
    for argument in arguments:
        name, settings = split_settings(argument)
        artifact = Artifact.find(name)
        folder, manifest = artifact.folder, artifact.manifest
        label = folder.name + (f"@{_listed(settings)}" if settings else "")
        added = Configuration(label, folder.absolute(), manifest, device, exact, {**shared, **settings})
        for other in found:
            if (other.folder.resolve(), other.settings) == (added.folder.resolve(), added.settings):
                raise UsageError(
                    f"{argument} is given twice with the same settings",
                    "add settings to one of them, such as: ARTIFACT@INFERENCE_NUM_THREADS=1",
                )
        found.append(added)
    labels = [configuration.label for configuration in found]
    return [
        replace(configuration, label=argument) if labels.count(configuration.label) > 1 else configuration
        for configuration, argument in zip(found, arguments, strict=True)
    ]


def count_threads(settings: Mapping[str, str], planned: int) -> int:
    """How many an engine with these settings computes with; `planned` where they do not say."""
    given = next((settings[name] for name in _THREADS if name in settings), "")
    return int(given) if given.isdigit() and int(given) > 0 else planned


def split_settings(argument: str) -> tuple[str, dict[str, str]]:
    """`name@a=1,b=2` is a name and two settings; an @ without a = behind it belongs to the name."""
    name, at, listed = argument.rpartition("@")
    if not at or "=" not in listed:
        return argument, {}
    return name, parse_settings(listed.split(","))


def _listed(settings: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items())
