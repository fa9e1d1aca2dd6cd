"""Puts the kernel's operator in the place of an OpenVINO model's products with int4 weights.

The IR on disk stays as it is. A product is `x @ (codes - zeros) * scales`, transposed, as NNCF writes it: a constant of
i4 or u4 [rows, groups, group], converted, zero points subtracted, scales multiplied, reshaped and converted. Products
of other weights, of groups over 128, or of widths that the kernel's tiles do not divide, are left to OpenVINO.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EngineError

if TYPE_CHECKING:
    import openvino as ov

_LANES, _STEP, _COLUMNS, _LARGEST_GROUP = (
    16,
    32,
    8,
    128,
)  # as in int4_matmul.cpp: rows of a vector and of a tile, columns
_HUGE_PAGE = 2**21
_SIGNED_TO_UNSIGNED = 0x88888888  # flips the upper bit of eight codes: i4 becomes u4 with the zero point 8

Bytes = NDArray[np.uint8]


class _Product(NamedTuple):
    """A MatMul node, and the constants that its weights are computed from."""

    node: Any
    codes: Any
    scales: Any
    zeros: Any | None


def replace_products(core: ov.Core, model: ov.Model, library: Path) -> list[Bytes] | None:
    """Use the kernel wherever it can.

    Args:
        core: that will compile the model; it learns the operator.
        library: compiled for the installed OpenVINO.

    Returns:
        the packed weights, about as many bytes as before. The model refers to them: they have to live as long as
        anything compiled from it. None where there was nothing to replace.

    Raises:
        EngineError: the library cannot be loaded.
    """
    from openvino import opset13 as ops
    from openvino.utils.node_factory import NodeFactory

    try:
        pack = ctypes.CDLL(str(library)).normistral_pack_int4
        core.add_extension(str(library))
        factory = NodeFactory()
        factory.add_extension(str(library))
    except (OSError, AttributeError, RuntimeError) as exc:
        raise EngineError(f"cannot load {library.name}: {exc}", "make it again: normistral build-kernel") from exc
    pack.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32)
    pack.restype = None
    products = list(_find_products(model))
    if not products:
        return None
    codes_bytes = sum(_code_bytes(product) for product in products)
    memory = _allocate(codes_bytes)
    held: list[Bytes] = [memory]
    start = 0
    for product in products:
        stop = start + _code_bytes(product)
        packed = [_pack_codes(product, memory[start:stop], pack), *_pack_grid(product)]
        weights = [ops.constant(array, shared_memory=True).output(0) for array in packed]
        operator = factory.create("Int4MatMul", [product.node.input_value(0), *weights], {})
        operator.set_friendly_name(product.node.get_friendly_name())
        product.node.output(0).replace(operator.output(0))
        held += packed
        start = stop
    model.validate_nodes_and_infer_types()
    return held


def _find_products(model: ov.Model) -> Iterator[_Product]:
    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        attributes = node.get_attributes()
        if attributes["transpose_a"] or not attributes["transpose_b"]:
            continue
        weights = _skip(_source(node, 1), "Convert", "Reshape")
        if weights.get_type_name() != "Multiply":
            continue
        scales, zeros = _skip(_source(weights, 1), "Convert"), None
        codes = _source(weights, 0)
        if codes.get_type_name() == "Subtract":
            zeros = _skip(_source(codes, 1), "Convert")
            codes = _source(codes, 0)
        codes = _skip(codes, "Convert")
        product = _Product(node, codes, scales, zeros)
        if _fits(product):
            yield product


def _fits(product: _Product) -> bool:
    constants = [product.codes, product.scales, *([] if product.zeros is None else [product.zeros])]
    if any(one.get_type_name() != "Constant" for one in constants) or len(product.codes.shape) != 3:
        return False
    rows, groups, group = product.codes.shape
    kinds = [one.get_element_type().get_type_name() for one in constants]
    return (
        kinds[0] in ("i4", "u4")
        and kinds[1] == "f16"
        and kinds[2:] in ([], kinds[:1])
        and (kinds[0] == "i4" or product.zeros is not None)
        and all(tuple(one.shape) == (rows, groups, 1) for one in constants[1:])
        and rows % _STEP == 0
        and group % _LANES == 0
        and group <= _LARGEST_GROUP
    )


def _code_bytes(product: _Product) -> int:
    rows, groups, group = product.codes.shape
    return int(rows * groups * group // 2)


def _allocate(count: int) -> Bytes:
    """Memory in huge pages, where the system has them to give: single tokens then read a third to a half faster."""
    memory = mmap.mmap(-1, count + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    return array[-array.ctypes.data % _HUGE_PAGE :][:count]


def _pack_codes(product: _Product, memory: Bytes, pack: Any) -> Bytes:
    """The codes in the kernel's layout, in this memory."""
    rows, groups, group = product.codes.shape
    columns = groups * group
    packed = memory.reshape(rows // _LANES, columns // _COLUMNS, _LANES * _COLUMNS // 2)
    codes = _raw(product.codes)
    pack(codes.ctypes.data, packed.ctypes.data, rows, columns, _SIGNED_TO_UNSIGNED if _is_signed(product) else 0)
    return packed


def _pack_grid(product: _Product) -> list[Bytes]:
    """Scales and zero points in the kernel's layout."""
    rows, groups, _ = product.codes.shape
    if product.zeros is None:
        zeros = np.full((rows, groups), 8, np.uint8)
    else:
        pairs = _raw(product.zeros)
        zeros = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[: rows * groups].reshape(rows, groups)
        if _is_signed(product):
            zeros ^= 8
    scales = np.asarray(product.scales.data).reshape(rows, groups)
    return [_by_lanes(scales).view(np.uint8), _by_lanes(zeros)]


def _is_signed(product: _Product) -> bool:
    return bool(product.codes.get_element_type().get_type_name() == "i4")


def _by_lanes(values: NDArray[Any]) -> NDArray[Any]:
    """[rows, groups] -> [rows / 16, groups, 16]."""
    rows, groups = values.shape
    return np.ascontiguousarray(values.reshape(rows // _LANES, _LANES, groups).transpose(0, 2, 1))


def _raw(constant: Any) -> Bytes:
    """The bytes of a constant of 4-bit values, two in each."""
    return np.asarray(constant.data).view(np.uint8).reshape(-1)


def _source(node: Any, index: int) -> Any:
    return node.input_value(index).get_node()


def _skip(node: Any, *operators: str) -> Any:
    """The node behind others that change only type or shape."""
    while node.get_type_name() in operators:
        node = _source(node, 0)
    return node
