"""KV caches of an ONNX decoder: tensors `past_key_values.N.key/value` in, `present.N.key/value` out.

Each is [1, kv_heads, length, head_dim]. What the graph does with the past decides how it is kept:
`SharedCache` for attention that appends to the past where it lies, `ChainedCache` for attention that returns a longer
copy. Both have the same methods: `prepare` binds a step from `length` to `total` positions, `advance` takes over what
it computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normistral.runtime.engines.base import CacheTensor, TensorKinds

if TYPE_CHECKING:
    from onnxruntime import IOBinding, OrtValue

CAPACITY_STEP = 512  # positions by which a shared buffer grows; 128 MiB for 7B. Growing copies the cache


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Shape, type and memory of the cache of one decoder.

    Attributes:
        names: past tensor -> present tensor.
        kv_heads, head_dim: of every tensor.
        dtype: of every tensor.
        memory: onnxruntime's name of the device: "cpu", "cuda", "dml".
        device_id: its index.
        limit: the most positions there can be.
    """

    names: dict[str, str]
    kv_heads: int
    head_dim: int
    dtype: np.dtype[Any]
    memory: str
    device_id: int
    limit: int

    def zeros(self, length: int) -> NDArray[Any]:
        """A tensor on the host; the system gives it memory page by page as it is written."""
        return np.zeros((1, self.kv_heads, length, self.head_dim), self.dtype)

    def kinds(self, length: int) -> TensorKinds:
        """The one type and shape of each tensor."""
        return {name: [(self.dtype, (1, self.kv_heads, length, self.head_dim))] for name in self.names}

    def place(self, tensor: NDArray[Any]) -> OrtValue:
        """The tensor where the cache lives; on the CPU it is not copied."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(tensor, self.memory, self.device_id)


class SharedCache:
    """One buffer per tensor, bound both as past and as present: a step writes its positions and copies nothing.

    The buffer is longer than the sequence; the graph takes the length from the attention mask.
    """

    def __init__(self, layout: CacheLayout, binding: IOBinding) -> None:
        self._layout = layout
        self._binding = binding
        self._capacity = 0
        self._values: dict[str, OrtValue] = {}

    def prepare(self, length: int, total: int) -> None:
        """Grow if need be; one tensor after the other, so that little is held twice."""
        if total > self._capacity:
            capacity = self._room(total)
            for name in self._layout.names:
                grown = self._layout.zeros(capacity)
                if length:
                    grown[:, :, :length] = self._values[name].numpy()[:, :, :length]
                self._bind(name, self._layout.place(grown))
            self._capacity = capacity

    def advance(self) -> None:
        """Nothing: the step wrote into the buffer."""

    def trim(self, length: int) -> None:
        """Nothing: what lies behind the length is never read."""

    def read(self, length: int) -> Iterator[CacheTensor]:
        """Copies of the first `length` positions, one after the other."""
        return _read(self._values, length)

    def write(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Replace everything by so many positions, in buffers with room for more."""
        self._capacity = 0  # until all have come
        capacity = self._room(length)
        for name, tensor in tensors:
            buffer = self._layout.zeros(capacity)
            buffer[:, :, :length] = tensor
            self._bind(name, self._layout.place(buffer))
        self._capacity = capacity

    def _room(self, length: int) -> int:
        return min(-(-length // CAPACITY_STEP) * CAPACITY_STEP, self._layout.limit)

    def _bind(self, name: str, value: OrtValue) -> None:
        self._values[name] = value
        self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(self._layout.names[name], value)


class ChainedCache:
    """The present that one step returns is the past of the next, without a copy."""

    def __init__(self, layout: CacheLayout, binding: IOBinding) -> None:
        self._layout = layout
        self._binding = binding
        self._values: dict[str, OrtValue] = {}
        self._clear()
        self._allow_outputs()  # first of all outputs, so that they come first in what `get_outputs` lists

    def prepare(self, length: int, total: int) -> None:
        """Bind the past, and let onnxruntime allocate the present."""
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._allow_outputs()

    def advance(self) -> None:
        """The present becomes the past. Its values refer to the binding's outputs, until those are bound again."""
        self._values = dict(zip(self._layout.names, self._binding.get_outputs(), strict=False))  # logits come last

    def trim(self, length: int) -> None:
        """Cut every tensor: copies what stays; 0 also clears the state of a failed step."""
        if length:
            self.write(length, self.read(length))
        else:
            self._clear()

    def read(self, length: int) -> Iterator[CacheTensor]:
        """Copies of the first `length` positions, one after the other."""
        return _read(self._values, length)

    def write(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Replace everything by so many positions."""
        self._values = {name: self._layout.place(tensor.copy()) for name, tensor in tensors}

    def _clear(self) -> None:
        self.write(0, (CacheTensor(name, self._layout.zeros(0)) for name in self._layout.names))

    def _allow_outputs(self) -> None:
        for present in self._layout.names.values():
            self._binding.bind_output(present, self._layout.memory, self._layout.device_id)


def _read(values: dict[str, OrtValue], length: int) -> Iterator[CacheTensor]:
    for name, value in values.items():
        yield CacheTensor(name, value.numpy()[:, :, :length].copy())
