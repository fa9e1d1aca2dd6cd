"""Engine on onnxruntime alone: a decoder with its KV cache as inputs and outputs, driven by our own loop.

The graph is read, changed in memory (onnx_graph.py) and given to onnxruntime as bytes; its weights stay in their file
and are mapped from there. One session serves many engines, each with a cache and an I/O binding of its own.

Exceptions of onnxruntime end here, as `EngineError` or `DeviceError`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from normistral import hardware
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.errors import ArtifactError, EngineError, UsageError
from normistral.runtime.engines import onnx_activations, onnx_graph
from normistral.runtime.engines.base import (
    CacheTensor,
    EngineInfo,
    Logits,
    UnmaskedEngine,
    check_cache_tensors,
    opened,
    warm_up,
)
from normistral.runtime.engines.onnx_cache import CacheLayout, ChainedCache, SharedCache
from normistral.runtime.engines.onnx_graph import LAST_POSITIONS, LOGITS, LOGITS_START, OnnxGraph
from normistral.runtime.engines.onnx_session import (
    SESSION_SETTINGS,
    open_session,
    session_options,
    settings_in_force,
    translated,
)
from normistral.runtime.engines.settings import DEFAULT_CONFIG, PREFILL_CHUNK, EngineConfig, Setting, override
from normistral.runtime.providers import ProviderTarget, find_target, import_onnxruntime, require_all_on

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

logger = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"
ACCURACY_LEVEL = "accuracy_level"  # of MatMulNBits; onnxruntime's CPU kernels know two
ACTIVATION_BITS = "activation_bits"  # ours, for level 4 and matrices of 8 bits
_LEVELS = Setting("[14]", "1 (products in float32) or 4 (activations rounded to int8)", changes_results=True)
_ACTIVATION_BITS = Setting("8|16", "8 (activations rounded to int8) or 16 (to a sum of two int8)", changes_results=True)
_FLOATS: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
# Settings that change what is computed.
_KV_CACHE_SETTINGS = ("provider", ACCURACY_LEVEL, ACTIVATION_BITS, "precision", "use_tf32")
PAST, PRESENT = "past_key_values.", "present."  # beginnings of the cache's inputs and outputs


@dataclass(frozen=True, slots=True)
class OnnxDecoder:
    """A session, and what all sequences on it share.

    Attributes:
        in_place: past and present may be one buffer.
        layout: of the KV cache.
        takes_positions: position_ids is an input.
        takes_lengths: so is last_positions (`onnx_graph.take_lengths`).
        logits_dtype: float32 or float16.
    """

    session: InferenceSession
    in_place: bool
    layout: CacheLayout
    takes_positions: bool
    takes_lengths: bool
    logits_dtype: np.dtype[Any]
    vocabulary: int

    def run(self, binding: IOBinding, token_ids: NDArray[np.int64], past: NDArray[np.int64], last: int) -> Logits:
        """Compute tokens [rows, n], each row behind `past` [rows] others; logits [rows, last, vocabulary].

        Args:
            binding: has the KV cache.
        """
        rows, count = token_ids.shape
        logits = np.empty((rows, last, self.vocabulary), self.logits_dtype)
        binding.bind_cpu_input("input_ids", token_ids)
        binding.bind_cpu_input("attention_mask", np.ones((rows, past.max() + count), np.int64))
        if self.takes_positions:
            binding.bind_cpu_input("position_ids", past[:, None] + np.arange(count))
        if self.takes_lengths:  # then only the shape of the mask is read
            binding.bind_cpu_input(LAST_POSITIONS, (past + count - 1).astype(np.int32))
        binding.bind_cpu_input(LOGITS_START, np.array([-last], np.int64))
        binding.bind_output(LOGITS, "cpu", 0, self.logits_dtype, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        result: Logits = logits.astype(np.float32, copy=False)
        return result


class OnnxBackend:
    """A session of onnxruntime; see `load_onnx`."""

    def __init__(self, decoder: OnnxDecoder, capabilities: EngineInfo) -> None:
        self._decoder: OnnxDecoder | None = decoder
        self.capabilities = capabilities

    @property
    def decoder(self) -> OnnxDecoder:
        """The session and what it computes."""
        return opened(self._decoder)

    def create_engine(self) -> OnnxEngine:
        """A new, empty sequence with a KV cache of its own."""
        return OnnxEngine(_Sequence(self.decoder))

    def close(self) -> None:
        """Let go of the weights; they are freed with the last engine made from them."""
        self._decoder = None


class _Sequence:
    """I/O binding and cache of an open engine."""

    def __init__(self, decoder: OnnxDecoder) -> None:
        with translated("onnxruntime could not create an I/O binding"):
            self.decoder = decoder
            self.binding = decoder.session.io_binding()
            self.cache = (SharedCache if decoder.in_place else ChainedCache)(decoder.layout, self.binding)


class OnnxEngine(UnmaskedEngine):
    """One sequence: an I/O binding and a KV cache."""

    def __init__(self, sequence: _Sequence) -> None:
        self._sequence: _Sequence | None = sequence

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append tokens; logits [last, vocabulary] of the last positions.

        Raises:
            EngineError: onnxruntime failed, or the sequence outgrows the model's context.
        """
        sequence = opened(self._sequence)
        total, limit = self.length + len(token_ids), sequence.decoder.layout.limit
        if total > limit:
            raise EngineError(f"{total} tokens do not fit into the model's context of {limit}")
        with translated(f"onnxruntime failed at token {total}"):
            sequence.cache.prepare(self.length, total)
            ids, past = np.array([token_ids], np.int64), np.array([self.length])
            logits = sequence.decoder.run(sequence.binding, ids, past, last)
            sequence.cache.advance()
        self.length = total
        result: Logits = logits[0]
        return result

    def trim(self, length: int, *, exactly: bool = False) -> None:
        """Forget everything after the first `length` tokens."""
        assert 0 <= length <= self.length
        if length < self.length:
            with translated("onnxruntime could not shorten the KV cache"):
                opened(self._sequence).cache.trim(length)
            self.length = length

    def reset(self) -> None:
        """Forget everything."""
        with translated("onnxruntime could not clear the KV cache"):
            opened(self._sequence).cache.trim(0)
        self.length = 0

    def save(self, length: int) -> Iterator[CacheTensor]:
        """The first `length` tokens of the KV cache, in its own precision."""
        tensors = opened(self._sequence).cache.read(length)
        while True:
            with translated("onnxruntime could not read the KV cache"):
                tensor = next(tensors, None)
            if tensor is None:
                return
            yield tensor

    def restore(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Continue from what `save` gave."""
        sequence = opened(self._sequence)
        kinds = sequence.decoder.layout.kinds(length)
        with translated("onnxruntime could not write the KV cache"):
            sequence.cache.write(length, check_cache_tensors(tensors, kinds))
        self.length = length

    def close(self) -> None:
        """Free the KV cache."""
        self._sequence = None


def load_onnx(artifact: Artifact, config: EngineConfig = DEFAULT_CONFIG) -> OnnxBackend:
    """Open an artifact's graph on a device and warm it up.

    Args:
        config: devices are CPU, CUDA, CUDA:1, OPENVINO:GPU ...: keys of `providers.PROVIDERS`, as far as the installed
            onnxruntime has their providers; exact is products of quantized weights in float32; settings are those of
            `normistral.load`.

    Raises:
        UsageError: an unknown setting or a wrong value.
        MissingExtraError: onnxruntime is not installed.
        DeviceError: the device is not there, or would leave matrix or attention nodes to the CPU.
        ArtifactError: the graph is damaged.
        EngineError: onnxruntime could not load or run the model.
    """
    folder, manifest, device, exact = artifact.folder, artifact.manifest, config.device, config.exact
    ort = import_onnxruntime()
    target = find_target(device, ort.get_available_providers(), exact=exact)
    graph = read_graph(folder, manifest)
    in_place = onnx_graph.is_fused(graph)
    plan = hardware.plan_onnxruntime(hardware.read_machine()) | dict(config.tuned or {})
    settings = override(plan, config.settings, known_settings(graph), engine="onnxruntime", exact=exact)
    prefill_chunk = settings.pop(PREFILL_CHUNK)
    level = "1" if exact else settings.pop(ACCURACY_LEVEL, None)
    activation_bits = choose_activation_bits(graph, target, level, settings.pop(ACTIVATION_BITS, None))
    adapt_graph(graph, level, activation_bits, lengths=target.is_cpu)
    options = session_options(settings, folder)
    with tempfile.TemporaryDirectory(prefix="normistral-") as scratch:
        if not target.is_cpu:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(scratch, "profile"))
        session = open_session(bytes(graph), options, target, folder.name)
        in_force = settings_in_force(session, settings) | {"provider": target.provider} | target.options
        if levels := onnx_graph.accuracy_levels(graph):
            in_force[ACCURACY_LEVEL] = ",".join(map(str, levels))
        if activation_bits is not None:
            in_force[ACTIVATION_BITS] = activation_bits
        in_force[PREFILL_CHUNK] = prefill_chunk
        decoder = describe_decoder(session, manifest, target, in_place=in_place)
        chosen = tuple(sorted(config.settings))
        kv_cache_key = {name: in_force[name] for name in _KV_CACHE_SETTINGS if name in in_force}
        kv_cache_key["cache"] = decoder.layout.dtype.name
        capabilities = EngineInfo(
            "onnxruntime", device, int(prefill_chunk), in_force, config.settings_source, chosen, kv_cache_key
        )
        backend = OnnxBackend(decoder, capabilities)
        warm_up(backend)
        if not target.is_cpu:
            require_all_on(target, Path(session.end_profiling()))
    logger.info("loaded %s on %s, settings by %s: %s", folder.name, device, config.settings_source, in_force)
    return backend


def read_graph(folder: Path, manifest: Manifest) -> OnnxGraph:
    """Take an artifact's model.onnx apart.

    Raises:
        ArtifactError: it cannot be read, or its weights are said to lie outside the artifact.
    """
    path = folder / MODEL_FILE
    try:
        graph = OnnxGraph(path.read_bytes())
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc.strerror}", "check the folder's permissions") from exc
    if strangers := sorted(graph.external_files() - manifest.files.keys()):
        raise ArtifactError(
            f"{MODEL_FILE} wants weights from {strangers[0]}, which is no file of the artifact",
            "export the model again",
        )
    return graph


def known_settings(graph: OnnxGraph) -> dict[str, Setting]:
    """Settings that a session on this graph takes."""
    known = dict(SESSION_SETTINGS)
    if onnx_graph.accuracy_levels(graph):
        known[ACCURACY_LEVEL] = _LEVELS
    if onnx_activations.can_split(graph):
        known[ACTIVATION_BITS] = _ACTIVATION_BITS
    return known


def choose_activation_bits(
    graph: OnnxGraph, target: ProviderTarget, level: str | None, given: str | None
) -> Literal["8", "16"] | None:
    """Bits of activations beside 8-bit weights; None where they are not rounded to int8 at all.

    Args:
        level: the accuracy level, None for the file's.
        given: the caller's choice.

    Raises:
        UsageError: one was given where none applies.
    """
    levels = onnx_graph.accuracy_levels(graph) if level is None else [int(level)]
    if target.is_cpu and onnx_activations.can_split(graph) and levels == [onnx_activations.INT8_LEVEL]:
        return "8" if given == "8" else "16"
    if given is None:
        return None
    raise UsageError(
        f"{ACTIVATION_BITS} means nothing here: activations are not rounded",
        f"leave it out, or on the CPU choose {ACCURACY_LEVEL}={onnx_activations.INT8_LEVEL}",
    )


def adapt_graph(
    graph: OnnxGraph, level: str | None, activation_bits: str | None = None, *, lengths: bool = False
) -> None:
    """Change the graph for this runtime; the file is made for every loader.

    Args:
        level: accuracy level of products of rounded weights; None keeps the file's.
        activation_bits: "16" multiplies activations beside 8-bit weights in two parts.
        lengths: let sequences of a batch have lengths of their own, where the graph allows it: not with activations in
            two parts, which are rows of a batch already.
    """
    onnx_graph.keep_last_logits(graph)
    if onnx_graph.is_fused(graph):
        onnx_graph.attend_in_place(graph)
        if lengths and activation_bits != "16":
            onnx_graph.take_lengths(graph)
    if level is not None:
        onnx_graph.set_accuracy_level(graph, int(level))
    if activation_bits == "16":
        onnx_activations.split_activations(graph)


def describe_decoder(
    session: InferenceSession, manifest: Manifest, target: ProviderTarget, *, in_place: bool
) -> OnnxDecoder:
    """Read inputs and outputs of a session.

    Raises:
        ArtifactError: they are not those of a decoder with a KV cache.
    """
    shape, limit = manifest.architecture, manifest.context_length
    inputs = {port.name: port.type for port in session.get_inputs()}
    outputs = {port.name: port.type for port in session.get_outputs()}
    tensors = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
    names = {PAST + name: PRESENT + name for name in tensors}
    needed = {"input_ids", "attention_mask", LOGITS_START, *names}
    cache_types = {inputs.get(name, "") for name in names}
    if not (
        needed <= inputs.keys() <= needed | {"position_ids", LAST_POSITIONS}
        and {LOGITS, *names.values()} <= outputs.keys()
        and len(cache_types) == 1
        and {outputs[LOGITS], *cache_types} <= _FLOATS.keys()
    ):
        raise ArtifactError(
            f"{MODEL_FILE} is no decoder with a KV cache for {shape.layers} layers: "
            f"its inputs are {', '.join(inputs)}, its outputs {', '.join(outputs)}",
            "export the model again",
        )
    return OnnxDecoder(
        session,
        in_place,
        CacheLayout(
            names,
            shape.kv_heads,
            shape.head_dim,
            _FLOATS[cache_types.pop()],
            target.memory,
            target.memory_index,
            limit,
        ),
        "position_ids" in inputs,
        LAST_POSITIONS in inputs,
        _FLOATS[outputs[LOGITS]],
        shape.vocabulary,
    )
