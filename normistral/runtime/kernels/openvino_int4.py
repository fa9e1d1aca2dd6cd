"""Custom int4 matmuls in an OpenVINO model: products that the kernel supports, and their weights in its layout.

The IR on disk stays as it is. A product is `x @ (codes - zeros) * scales`, transposed, as NNCF writes it: a constant of
i4 or u4 [rows, groups, group], converted, zero points subtracted, scales multiplied, reshaped and converted. Products
of other weights, of groups of 16 or over 128, or of widths that the kernel's tiles do not divide, are left to OpenVINO.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EngineError
from normistral.runtime.interpreter_exit import InterruptSafeLock
from normistral.runtime.kernels.library import BUILD, Library

if TYPE_CHECKING:
    import openvino as ov

OPERATOR, OPERATOR_SET, NUMBER = "Int4MatMul", "normistral", "weights"  # as int4_matmul.cpp names itself
_STEP = 32  # as there: rows and groups are multiples of it
_LARGEST_GROUP = 128
_HUGE_PAGE = 2**21
_AGAIN = f"make it again: {BUILD}"
_SIGNED_TO_UNSIGNED = 0x88888888  # flips the upper bit of eight codes: i4 becomes u4 with the zero point 8

Bytes = NDArray[np.uint8]


class _Product(NamedTuple):
    """A MatMul node, and the constants that its weights are computed from."""

    node: Any
    codes: Any
    scales: Any
    zeros: Any | None


class PackedWeights:
    """The weights of a model's products in the kernel's layout, about as many bytes as before.

    They have to live as long as anything compiled that uses them: an operator that no longer finds its weights fails.

    Attributes:
        library: the kernel they are for, as a loader finds it.
        numbers: by which operators find them, for each product by its name in the IR.
    """

    def __init__(self, library: Library, kernel: ctypes.CDLL, products: Sequence[_Product]) -> None:
        self.library = library.loadable
        self.numbers: dict[str, int] = {}
        self._memory: list[Bytes] = [_allocate(sum(map(_code_bytes, products)))]
        start, lanes = 0, kernel.normistral_int4_lanes()
        for product in products:
            stop = start + _code_bytes(product)
            codes = _pack_codes(product, self._memory[0][start:stop], kernel)
            grid = _pack_grid(product, lanes)
            self._memory += grid
            rows, groups, group = product.codes.shape
            number = kernel.normistral_hold_int4(
                *(array.ctypes.data for array in (codes, *grid)), rows, groups * group, groups
            )
            self.numbers[product.node.get_friendly_name()] = number
            start = stop
        weakref.finalize(self, _forget, kernel, list(self.numbers.values())).atexit = False


_shared: WeakValueDictionary[tuple[object, ...], PackedWeights] = WeakValueDictionary()
_sharing = InterruptSafeLock()


def pack_products(model: ov.Model, model_file: Path, library: Library) -> PackedWeights | None:
    """The weights of a model as read from this file; a file that is loaded twice in one process is packed once.

    Args:
        library: the kernel, compiled for the installed OpenVINO, as it was checked.

    Returns:
        None where the kernel can do none of the products.

    Raises:
        EngineError: the library cannot be loaded.
    """
    stat = model_file.with_suffix(".bin").stat()
    key = (library, model_file.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    with _sharing:
        packed = _shared.get(key)
        if packed is None:
            products = list(_find_products(model))
            if not products:
                return None
            packed = _shared[key] = PackedWeights(library, _open_library(library), products)
    return packed


def replace_products(core: ov.Core, model: ov.Model, packed: PackedWeights) -> None:
    """Put the kernel's operator into the place of the products whose weights these are.

    Args:
        core: that will compile the model; it learns the operator.

    Raises:
        EngineError: the kernel cannot be loaded.
    """
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    try:
        core.add_extension(packed.library)
        factory.add_extension(packed.library)
    except RuntimeError as exc:
        raise EngineError(f"OpenVINO cannot load the int4 kernel: {exc}", _AGAIN) from exc
    for product in list(_find_products(model)):
        name = product.node.get_friendly_name()
        operator = factory.create(OPERATOR, [product.node.input_value(0)], {NUMBER: packed.numbers[name]})
        operator.set_friendly_name(name)
        product.node.output(0).replace(operator.output(0))
    model.validate_nodes_and_infer_types()


def _open_library(library: Library) -> ctypes.CDLL:
    try:
        kernel = ctypes.CDLL(library.loadable)
        pack, hold, forget = kernel.normistral_pack_int4, kernel.normistral_hold_int4, kernel.normistral_forget_int4
    except (OSError, AttributeError) as exc:
        reason = str(exc).removeprefix(f"{library.loadable}: ")
        raise EngineError(f"cannot load {library.path.name}: {reason}", _AGAIN) from exc
    pack.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32)
    hold.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
    forget.argtypes = (ctypes.c_int64,)
    pack.restype = forget.restype = None
    hold.restype = kernel.normistral_int4_lanes.restype = ctypes.c_int64
    return kernel


def _forget(kernel: ctypes.CDLL, numbers: Sequence[int]) -> None:
    for number in numbers:
        kernel.normistral_forget_int4(number)


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
        and group % _STEP == 0
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


def _pack_codes(product: _Product, memory: Bytes, kernel: ctypes.CDLL) -> Bytes:
    """The codes in the kernel's layout, in this memory."""
    rows, groups, group = product.codes.shape
    flip = _SIGNED_TO_UNSIGNED if _is_signed(product) else 0
    kernel.normistral_pack_int4(_raw(product.codes).ctypes.data, memory.ctypes.data, rows, groups * group, flip)
    return memory


def _pack_grid(product: _Product, lanes: int) -> list[Bytes]:
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
    return [_by_lanes(scales, lanes).view(np.uint8), _by_lanes(zeros, lanes)]


def _is_signed(product: _Product) -> bool:
    return bool(product.codes.get_element_type().get_type_name() == "i4")


def _by_lanes(values: NDArray[Any], lanes: int) -> NDArray[Any]:
    """[rows, groups] -> [rows / lanes, groups, lanes]."""
    rows, groups = values.shape
    return np.ascontiguousarray(values.reshape(rows // lanes, lanes, groups).transpose(0, 2, 1))


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
