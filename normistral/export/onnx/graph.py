"""An ONNX graph under construction: nodes, small constants, and weights that are written directly to the data file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

import normistral
from normistral.export.checkpoint.tensor import Rows, WeightReader
from normistral.export.onnx.signature import GRAPH_NAME, Signature
from normistral.export.quantize.rtn import quantize_rtn
from normistral.export.quantize.scheme import QuantizedTensor, QuantScheme
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.progress import Stage

MICROSOFT = "com.microsoft"  # operators that onnxruntime adds to the standard ones

ALIGNMENT = 4096  # of each tensor in the file: a page, so that mapped tensors share none
_IR_VERSION = 10  # what onnx 1.16 wrote: old enough for every runtime that knows the operators used here
_AHEAD = 3  # blocks being rounded while one is written


class ExternalData:
    """An open data file; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, name: str, dtype: int, shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]) -> onnx.TensorProto:
        """Append a tensor.

        Args:
            dtype: a TensorProto.DataType.
            shape: of the whole tensor; the blocks come in its row-major order.

        Returns:
            the initializer that points to it.
        """
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)  # the gap reads as zeros
        for block in blocks:
            self._file.write(np.ascontiguousarray(block).data)
        return point_to(name, dtype, shape, self._path.name, offset, self._file.tell() - offset)


def point_to(
    name: str, dtype: int, shape: tuple[int, ...], location: str, offset: int, length: int
) -> onnx.TensorProto:
    """An initializer whose bytes lie in a file; several may point to the same bytes with shapes of their own."""
    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A rounded matrix in the data file: its initializers, which the graph may use or look at in another shape."""

    qweight: TensorProto
    scales: TensorProto
    zero_points: TensorProto | None
    scheme: QuantScheme


@dataclass(slots=True)
class Graph:
    """Collects one model.

    Attributes:
        float_type: TensorProto type of activations, scales and vectors.
        stage: advanced by the stored bytes of each tensor that was read.
        quantized: matrices that a calibration has rounded already; the others are rounded to nearest.
    """

    reader: WeightReader
    data: ExternalData
    stage: Stage
    float_type: int
    quantized: QuantizedTensorStore | None = None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """`float_type` in numpy's terms."""
        return onnx.helper.tensor_dtype_to_np_dtype(self.float_type)

    def node(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> str:
        """Add a node, named after its first output, and return that output's name."""
        self.nodes.append(
            onnx.helper.make_node(operator, inputs, outputs, name=f"/{outputs[0]}", domain=domain, **attributes)
        )
        return outputs[0]

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """A small initializer inside model.onnx."""
        self.initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def store(self, name: str, values: NDArray[Any]) -> str:
        """Computed floats in the data file, so that model.onnx stays small enough to be hashed at every load."""
        return self.use(self.data.write(name, self.float_type, values.shape, [self._as_floats(values)]))

    def vector(self, name: str) -> str:
        """A checkpoint's vector, as floats inside model.onnx."""
        return self.vectors(name, [name])

    def vectors(self, name: str, parts: Sequence[str]) -> str:
        """Vectors of a checkpoint one after another, as `vector`."""
        self.stage.advance(self.reader.nbytes(parts))
        return self.constant(name, np.concatenate([self._as_floats(self.reader.read(part)) for part in parts]))

    def table(self, name: str, parts: Sequence[str], scheme: QuantScheme) -> QuantizedMatrix:
        """Matrices [out, in] below each other, rounded on the way into the data file.

        Codes are [rows, blocks, bytes], scales [rows, blocks], as MatMulNBits wants them.
        """
        columns = self.reader.shape(parts[0])[1]
        rows = sum(self.reader.shape(part)[0] for part in parts)
        blocks = columns // scheme.group_size
        scales: list[NDArray[Any]] = []
        zero_points: list[NDArray[np.uint8]] = []

        def qweight() -> Iterator[NDArray[np.uint8]]:
            for rounded in self._quantize(parts, scheme):
                scales.append(self._as_floats(rounded.scales))
                if rounded.zero_points is not None:
                    zero_points.append(rounded.zero_points)
                yield rounded.qweight

        shape = (rows, blocks, scheme.qweight_bytes(scheme.group_size))
        stored = self.data.write(f"{name}.codes", TensorProto.UINT8, shape, qweight())
        scale = self.data.write(f"{name}.scales", self.float_type, (rows, blocks), scales)
        zeros = None
        if not scheme.symmetric:
            shape_of_zeros = (rows, scheme.zero_point_bytes(columns))
            zeros = self.data.write(f"{name}.zero_points", TensorProto.UINT8, shape_of_zeros, zero_points)
        return QuantizedMatrix(stored, scale, zeros, scheme)

    def matrix(self, name: str, parts: Sequence[str], *, transposed: bool) -> str:
        """Matrices [out, in] below each other, as floats in the data file; transposed they are [in, out]."""
        columns = self.reader.shape(parts[0])[1]
        rows = sum(self.reader.shape(part)[0] for part in parts)
        blocks: Iterable[NDArray[Any]] = map(self._as_floats, self._read(parts))
        shape = (rows, columns)
        if transposed:
            whole = np.empty((columns, rows), self.float_dtype)
            start = 0
            for block in blocks:
                whole[:, start : start + len(block)] = block.T
                start += len(block)
            blocks, shape = [whole], (columns, rows)
        self.initializers.append(self.data.write(name, self.float_type, shape, blocks))
        return name

    def use(self, tensor: TensorProto | None) -> str:
        """Make a tensor of the data file an initializer, once however often it is used; "" for None."""
        if tensor is None:
            return ""
        if all(known is not tensor for known in self.initializers):
            self.initializers.append(tensor)
        return str(tensor.name)

    def view(self, tensor: TensorProto, name: str, shape: tuple[int, ...]) -> str:
        """The bytes of a tensor in the data file under another name and shape; they are there once."""
        where = {entry.key: entry.value for entry in tensor.external_data}
        self.initializers.append(
            point_to(name, tensor.data_type, shape, where["location"], int(where["offset"]), int(where["length"]))
        )
        return name

    def save(self, folder: Path, signature: Signature) -> None:
        """Write model.onnx; the weights are in the data file already."""
        graph = onnx.helper.make_graph(
            self.nodes,
            "decoder",
            signature.inputs,
            signature.outputs,
            self.initializers,
        )
        opsets = {"": signature.opset} | {node.domain: 1 for node in self.nodes if node.domain == MICROSOFT}
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid(domain, opset) for domain, opset in opsets.items()],
            ir_version=_IR_VERSION,
            producer_name="normistral",
            producer_version=normistral.__version__,
        )
        (folder / GRAPH_NAME).write_bytes(model.SerializeToString(deterministic=True))

    def _as_floats(self, values: NDArray[np.float32]) -> NDArray[Any]:
        return values.astype(self.float_dtype, copy=False)

    def scheme_of(self, part: str, scheme: QuantScheme) -> QuantScheme:
        """The scheme of the calibration if it has quantized this matrix, else `scheme`."""
        return scheme if self.quantized is None else self.quantized.schemes.get(self.reader.source(part)[0], scheme)

    def _quantize(self, parts: Sequence[str], scheme: QuantScheme) -> Iterator[QuantizedTensor]:
        for part in parts:
            name, rows = self.reader.source(part)
            if self.quantized is None or name not in self.quantized.schemes:
                yield from _quantize_ahead(self._read([part]), scheme)
                continue
            assert self.quantized.schemes[name] == scheme
            for some in rows:
                yield self.quantized.read(name, some.start, some.stop)
            self.stage.advance(self.reader.nbytes([part]))

    def _read(self, parts: Sequence[str]) -> Iterator[Rows]:
        for part in parts:
            width = self.reader.nbytes([part]) // self.reader.shape(part)[0]
            for block in self.reader.blocks(part):
                self.stage.advance(width * len(block))
                yield block


def _quantize_ahead(blocks: Iterator[Rows], scheme: QuantScheme) -> Iterator[QuantizedTensor]:
    """Quantize blocks in order, in two threads that run a few blocks ahead (numpy releases the GIL)."""
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="round") as executor:
        pending = deque(executor.submit(quantize_rtn, block, scheme) for block in islice(blocks, _AHEAD))
        while pending:
            rounded = pending.popleft().result()
            pending.extend(executor.submit(quantize_rtn, block, scheme) for block in islice(blocks, 1))
            yield rounded
