"""Engine on a stateful IR of OpenVINO: for devices without PagedAttention, and for sessions that were saved with it.

The KV cache lives inside an infer request as variables (`past_key_values.N.key/value`, of shape
[1, kv_heads, length, head_dim]). One compiled model serves many requests, so every sequence has a cache of its own
and the weights exist once.

What `save` gives is the KV cache as the plugin stores it, made from the float32 that it shows.

A state reads as float32 whatever KV_CACHE_PRECISION is in force. Of a cache in 16 bits that is a widening, which half
the bytes hold without loss. Of an 8-bit one (the CPU's default) it is what the codes stand for:

    scale = (most - least) / 255      zero = -least / scale         of each row: one token, one head
    code = round(value / scale + zero)          value = (code - zero) * scale

Written back as they are, such values are quantised again with a scale that differs in its last bits, and the next
answer drifts as far as 8 bits allow. So a row is kept as its codes and the two numbers, least and most, from which the
plugin computes the very same scale. They are not shown, but lie within a few units in the last place of what is, and
are found by trying (attn_quant.cpp of OpenVINO's CPU plugin; a test compares the caches bit by bit).

What does not come out the same is kept as float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normistral.artifact.manifest import Manifest
from normistral.runtime.engines.base import CacheTensor, EngineInfo, Logits, check_cache_tensors, opened
from normistral.runtime.engines.openvino_graph import LAST
from normistral.runtime.engines.openvino_settings import translated
from normistral.runtime.kernels.openvino_int4 import PackedWeights

if TYPE_CHECKING:
    import openvino as ov

_FEW_DEAD = 32  # masked positions that are never worth a copy
_DEAD_SHARE = 8  # more than an eighth of the living is
_ENDS = 8  # bytes behind the codes of a row: least and most, float32
_LARGEST_CODE = np.float32(255)
_FLAT = np.float32(1e-4)  # the scale of a row whose values are all the same
_PLACES = 4  # how far to look for the least and the most; 3 is enough for values four deviations from 0
_STEPS = sorted(  # the likeliest first: least is mostly the number that is shown, most one or two beside it
    product(range(-_PLACES, _PLACES + 1), repeat=2), key=lambda steps: 3 * abs(steps[0]) + abs(steps[1])
)


class StatefulBackend:
    """A compiled OpenVINO model; see `load_openvino`."""

    def __init__(
        self,
        compiled: ov.CompiledModel,
        manifest: Manifest,
        capabilities: EngineInfo,
        packed: PackedWeights | None = None,
    ) -> None:
        """Take over a compiled model, and the weights that it uses beside its own."""
        shape = manifest.architecture
        self._packed = packed
        self._compiled: ov.CompiledModel | None = compiled
        self._takes_positions = any("position_ids" in port.get_names() for port in compiled.inputs)
        self._position_limit = min(shape.sliding_window or manifest.context_length, manifest.context_length)
        # ALiBi takes its positions from the running sum of the mask; any other graph without the input, from the cache.
        self._keeps_dead = self._takes_positions or shape.positions == "alibi"
        # A device that does not say it may keep 8 bits; what does not look like that is left as it is.
        self._cache_precision = capabilities.kv_cache_key.get("KV_CACHE_PRECISION", "u8")
        self.capabilities = capabilities

    def create_engine(self) -> StatefulEngine:
        """A new, empty sequence with a KV cache of its own."""
        with translated("OpenVINO could not create an infer request"):
            request = opened(self._compiled).create_infer_request()
        positions = MaskedPositions(self._position_limit, keeps_dead=self._keeps_dead)
        return StatefulEngine(request, self._takes_positions, positions, self._cache_precision, self._packed)

    def close(self) -> None:
        """Let go of the weights; they are freed with the last engine made from them."""
        self._compiled = None
        self._packed = None


class StatefulEngine:
    """One sequence in one infer request."""

    def __init__(
        self,
        request: ov.InferRequest,
        takes_positions: bool,
        positions: MaskedPositions,
        cache_precision: str,
        packed: PackedWeights | None = None,
    ) -> None:
        self._request: ov.InferRequest | None = request
        self._packed = packed  # held here too: the backend may be closed first
        self._takes_positions = takes_positions  # a model with ALiBi has no such input
        self._positions = positions
        self._cache_precision = cache_precision
        self._beam = np.zeros(1, np.int32)
        self.batch_invariant = False  # one sequence at a time
        self._requantised = False  # by a restore: what was shown did not fit the plugin's formula (module docstring)

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._positions.length

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append tokens; logits [last, vocabulary] of the last positions.

        Raises:
            EngineError: OpenVINO failed.
        """
        request, positions, count = opened(self._request), self._positions, len(token_ids)
        if positions.must_compact(count):
            self._compact()
        total = positions.length + count
        inputs = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": positions.extended_mask(count),
            "beam_idx": self._beam,
            LAST: np.array([last], np.int64),
        }
        if self._takes_positions:
            inputs["position_ids"] = np.arange(positions.length, total, dtype=np.int64)[None]
        with translated(f"OpenVINO failed at token {total}"):
            request.infer(inputs, share_inputs=True)
            logits = request.get_tensor("logits").data  # [1, last, vocabulary]
        positions.append(count)
        return np.array(logits[0], dtype=np.float32)  # a copy: the request overwrites its tensor at the next step

    @property
    def intact(self) -> int:
        """Those before the first masked position; none after a restore that had to quantise values anew."""
        return 0 if self._requantised else self._positions.intact

    def trim(self, length: int, *, exactly: bool = False) -> None:
        """Forget everything after the first `length` tokens; unless `exactly`, they may stay in the cache, masked."""
        assert 0 <= length <= self.length
        if length == 0:
            self.reset()
        else:
            self._positions.trim(length)
            if self._positions.must_compact(1) or (exactly and self._positions.dead):
                self._compact()

    def reset(self) -> None:
        """Forget everything."""
        opened(self._request).reset_state()
        self._positions.compacted(0)
        self._requantised = False

    def save(self, length: int) -> Iterator[CacheTensor]:
        """The first `length` tokens of the KV cache, packed as the module says.

        Masked positions go first: with them here and not in the copy, the two would go on with other last bits.
        """
        if self._positions.dead:
            self._compact()
        yield from self._read(length)

    def restore(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Continue from what `save` gave."""
        import openvino as ov

        self.reset()
        states = {state.name: state for state in self._query_states()}
        empty = {name: state.state for name, state in states.items()}  # [0, kv_heads, 0, head_dim]
        kinds = {name: packed_kinds((1, tensor.shape[1], length, tensor.shape[3])) for name, tensor in empty.items()}
        requantised = False
        for name, packed in check_cache_tensors(tensors, kinds):
            requantised = requantised or not is_lossless(packed, self._cache_precision)
            values = unpack(packed).astype(empty[name].element_type.to_dtype(), copy=False)
            with translated("OpenVINO could not write the KV cache"):
                states[name].state = ov.Tensor(values, shared_memory=True)  # the state makes the one copy
        self._positions.compacted(length)
        self._requantised = requantised

    def close(self) -> None:
        """Free the KV cache."""
        self._request = None
        self._packed = None

    def _compact(self) -> None:
        """Copy the unmasked positions out and in, which drops the masked ones."""
        self.restore(self.length, list(self._read(self.length)))

    def _read(self, length: int) -> Iterator[CacheTensor]:
        living = self._positions.living()[:length]
        for state in self._query_states():
            with translated("OpenVINO could not read the KV cache"):
                values = state.state.data  # [1, kv_heads, positions, head_dim], a copy
            yield CacheTensor(state.name, pack(np.ascontiguousarray(values[:, :, living]), self._cache_precision))

    def _query_states(self) -> list[Any]:
        with translated("OpenVINO could not find the KV cache"):
            return list(opened(self._request).query_state())


class MaskedPositions:
    """Which positions of one sequence's cache hold tokens; arithmetic only, the cache itself is the engine's.

    OpenVINO appends to its cache and cannot shorten it; only copying the whole of it out and in does. So a rejected
    token stays where it is: the attention mask hides it, and position ids count living tokens. Masked positions weigh
    exactly 0 in the attention; logits differ from those of a clean cache by the order of sums alone
    (docs/decisions.md).

        cache     0 1 2 3 4 5 6
        mask      1 1 1 0 0 1 1      after tokens 3 and 4 were rejected and two others appended
        position  0 1 2 - - 3 4

    Args:
        limit: most positions in use while some are masked; the graph counts a sliding window, and the end of the
            context, in positions of the cache.
        keeps_dead: whether masked positions leave position ids alone in this graph; otherwise none may be masked.
    """

    __slots__ = ("_keeps_dead", "_limit", "_mask", "length")

    def __init__(self, limit: int, *, keeps_dead: bool) -> None:
        self._limit = limit
        self._keeps_dead = keeps_dead
        self._mask: NDArray[np.int64] = np.ones(0, np.int64)
        self.length = 0  # tokens: unmasked positions

    def extended_mask(self, count: int) -> NDArray[np.int64]:
        """Mask [1, positions] for a forward of `count` more tokens."""
        return np.concatenate([self._mask, np.ones(count, np.int64)])[None]

    def append(self, count: int) -> None:
        """The forward of `count` tokens is done."""
        self._mask = self.extended_mask(count)[0]
        self.length += count

    def trim(self, length: int) -> None:
        """Mask the positions behind the first `length` tokens."""
        self._mask[self.living()[length:]] = 0
        self.length = length

    def living(self) -> NDArray[np.int64]:
        """Indices of the positions that hold tokens, in order."""
        living: NDArray[np.int64] = np.flatnonzero(self._mask)
        return living

    @property
    def dead(self) -> int:
        """Number of positions that hold rejected tokens."""
        return len(self._mask) - self.length

    @property
    def intact(self) -> int:
        """Tokens before the first masked position."""
        return int(self._mask.argmin()) if self.dead else self.length

    def must_compact(self, count: int) -> bool:
        """Whether the masked positions have to go before `count` tokens are appended."""
        dead = self.dead
        too_many = dead > max(_FEW_DEAD, self.length // _DEAD_SHARE)
        return dead > 0 and (not self._keeps_dead or too_many or len(self._mask) + count > self._limit)

    def compacted(self, length: int) -> None:
        """The cache was cut to `length` tokens and holds nothing else."""
        self._mask = np.ones(length, np.int64)
        self.length = length


def pack(values: NDArray[Any], precision: str) -> NDArray[Any]:
    """The values in as few bytes as hold them without loss.

    Args:
        values: [1, kv_heads, n, head_dim], as the state shows them.
        precision: OpenVINO's name of the cache's own type: "u8", "f16", "bf16", "f32" ...

    Returns:
        uint8 [1, kv_heads, n, head_dim + 8], float16, uint16 (the upper half of float32), or the values themselves.
    """
    if values.dtype != np.float32:
        return values
    if precision == "u8":
        packed = _pack_rows(values)
        return values if packed is None else packed
    narrow: NDArray[Any]
    if precision == "f16":
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float16)
    elif precision == "bf16":
        narrow = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        return values
    return narrow if np.array_equal(unpack(narrow), values) else values


def is_lossless(packed: NDArray[Any], precision: str) -> bool:
    """Whether the plugin stores what it stored when `pack` gave this; see there for `precision`."""
    return packed.dtype != np.float32 or precision in ("f32", "f16", "bf16")


def unpack(packed: NDArray[Any]) -> Logits:
    """Float32 values that make the plugin store what it stored when `pack` was given them."""
    if packed.dtype == np.uint8:
        return _unpack_rows(packed)
    if packed.dtype == np.uint16:
        return (packed.astype(np.uint32) << 16).view(np.float32)
    return packed.astype(np.float32, copy=False)


def packed_kinds(shape: tuple[int, ...]) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Types and shapes in which values of this shape may come."""
    rows = (*shape[:-1], shape[-1] + _ENDS)
    return [(np.dtype(np.uint8), rows), *((np.dtype(t), shape) for t in (np.float32, np.float16, np.uint16))]


def _pack_rows(values: Logits) -> NDArray[np.uint8] | None:
    """Codes and ends of every row; None where some row is not of the form above."""
    rows = values.reshape(-1, values.shape[-1])
    least, most = rows.min(1), rows.max(1)
    scale, zero = _scale_and_zero(least, most)
    with np.errstate(invalid="ignore"):  # what is not finite fits nowhere
        codes = np.rint(rows / scale[:, None] + zero[:, None]).astype(np.uint8)
        unit = np.spacing(np.abs(least))
        span_unit = np.maximum(np.spacing(np.abs(most)), np.spacing(most - least) / 2)  # finer ones change no scale
    ends = np.empty((len(rows), 2), "<f4")
    left = np.arange(len(rows))
    for lower, higher in _STEPS:
        low = least[left] + np.float32(lower) * unit[left]
        high = most[left] + np.float32(higher) * span_unit[left]
        scale, zero = _scale_and_zero(low, high)
        with np.errstate(invalid="ignore", over="ignore"):
            fits = ((0 - zero) * scale == least[left]) & ((_LARGEST_CODE - zero) * scale == most[left])
        fits[fits] = (_dequantise(codes[left[fits]], scale[fits], zero[fits]) == rows[left[fits]]).all(1)
        ends[left[fits], 0], ends[left[fits], 1] = low[fits], high[fits]
        left = left[~fits]
        if not len(left):
            return np.concatenate([codes, ends.view(np.uint8)], axis=1).reshape(*values.shape[:-1], -1)
    return None


def _unpack_rows(packed: NDArray[np.uint8]) -> Logits:
    codes = packed[..., :-_ENDS]
    ends = np.ascontiguousarray(packed[..., -_ENDS:]).view("<f4")  # [1, kv_heads, n, 2]
    least, most = ends[..., 0], ends[..., 1]
    values = _dequantise(codes, *_scale_and_zero(least, most))
    np.copyto(values, least[..., None], where=codes == 0)
    np.copyto(values, most[..., None], where=codes == _LARGEST_CODE)
    return values


def _dequantise(codes: NDArray[np.uint8], scale: Logits, zero: Logits) -> Logits:
    values: Logits = codes - zero[..., None]
    values *= scale[..., None]
    return values


def _scale_and_zero(least: Logits, most: Logits) -> tuple[Logits, Logits]:
    with np.errstate(invalid="ignore", over="ignore"):
        scale = (most - least) / _LARGEST_CODE
        scale = np.where(scale == 0, _FLAT, scale)
        return scale, -least / scale
