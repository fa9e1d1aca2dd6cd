"""Put matrices that we rounded into a graph that NNCF has compressed to 4 bits: same structure, other values.

Where a matrix takes 8 bits its constants take another type; OpenVINO reads groups of either.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ExportError
from normistral.export.quantize.scheme import QuantizedTensor, QuantScheme, unpack
from normistral.export.quantize.tensor_store import QuantizedTensorStore

if TYPE_CHECKING:
    import openvino

# The second where it was bfloat16 or float16. NNCF names scales, zero points and their subtraction after it.
_MATRIX = re.compile(r"self\.(.+)\.(?:weight|_openvino_orig_weight)(/scale|/zero_point|/zero_point/subtract)?")


def replace_weights(graph: openvino.Model, quantized: QuantizedTensorStore) -> None:
    """Replace the constants of every matrix in `quantized`, one by one, so that memory never exceeds the final graph's.

    Raises:
        ExportError: the graph holds a matrix in another way than `quantized` does, or not at all.
    """
    expected = {(name, part) for name, scheme in quantized.schemes.items() for part in _parts(scheme)}
    nodes = deque(graph.get_ops())
    while nodes:  # each goes as it comes: kept, they would keep the constants that were replaced, the weights twice
        node = nodes.popleft()
        match = _MATRIX.fullmatch(node.get_friendly_name())
        if match is None or f"{match[1]}.weight" not in quantized.schemes:
            continue
        name, part = f"{match[1]}.weight", match[2] or ""
        scheme = quantized.schemes[name]
        if part == "/zero_point/subtract":
            if scheme.symmetric:
                node.output(0).replace(node.input_value(0))
        elif (name, part) in expected:
            expected.remove((name, part))
            kind = "f16" if part == "/scale" else f"{'i' if scheme.symmetric else 'u'}{scheme.bits}"
            _replace(node, _values(quantized.read(name), scheme, part), kind)
            _trim_heap()
        elif scheme.bits == 4:
            raise ExportError(f"NNCF's graph holds {name}{part}, which was not rounded for it")
    if expected:
        name, part = min(expected)
        raise ExportError(f"NNCF's graph lacks {name}{part} and {len(expected) - 1} more constants")
    graph.validate_nodes_and_infer_types()


def _trim_heap() -> None:
    """Return freed memory to the system.

    glibc keeps freed blocks below 32 MiB, and new constants do not fill all the holes of old ones: 2 GB of a 7B's 4.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _parts(scheme: QuantScheme) -> tuple[str, ...]:
    return ("", "/scale") if scheme.symmetric else ("", "/scale", "/zero_point")


def _values(rounded: QuantizedTensor, scheme: QuantScheme, part: str) -> NDArray[Any]:
    """The bytes of one constant."""
    if part == "/scale":
        return rounded.scales.astype(np.float16)  # they are float16 values: search_params rounds them
    if part == "/zero_point":
        assert rounded.zero_points is not None
        zeros = unpack(rounded.zero_points, scheme.bits)[:, : rounded.scales.shape[1]]
        if scheme.bits == 8:
            return np.ascontiguousarray(zeros)
        flat = np.append(zeros.reshape(-1), np.zeros(zeros.size % 2, np.uint8))  # rows share bytes here
        return np.asarray(flat[0::2] | (flat[1::2] << np.uint8(4)))
    if not scheme.symmetric:
        return rounded.qweight
    return rounded.qweight ^ np.uint8(0x88 if scheme.bits == 4 else 0x80)  # value - middle, in two's complement


def _replace(node: Any, values: NDArray[Any], kind_name: str) -> None:
    import openvino
    from openvino import op

    found, shape, kind = node.get_element_type(), node.get_output_shape(0), getattr(openvino.Type, kind_name)
    bytes_agree = values.nbytes == -(-int(np.prod(shape)) * kind.bitwidth // 8)
    if not bytes_agree or found.is_integral() != kind.is_integral():
        raise ExportError(
            f"NNCF holds {node.get_friendly_name()} as {found} of shape {list(shape)}, not as it was rounded"
        )
    # Copied: neither Tensor nor a shared Constant keeps the array alive, and 4-bit values must come as bytes.
    new = op.Constant(openvino.Tensor(np.ascontiguousarray(values), shape, kind), shared_memory=False)
    new.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(new.output(0))
