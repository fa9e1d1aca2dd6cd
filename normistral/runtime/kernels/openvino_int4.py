"""Custom matmuls in an OpenVINO model: products that the kernel supports, and their weights in its layout.

The IR on disk stays as it is. A product is `x @ (codes - zeros) * scales`, transposed, as NNCF writes it: a constant of
i4 or u4 [rows, groups, group], converted, zero points subtracted, scales multiplied, reshaped and converted; or one of
i8 or u8 [rows, columns] with a scale for each row, as the output layer and int8 artifacts have it. Products of other
weights, of groups of 16 or over 128, or of widths that the kernel's tiles do not divide, are left to OpenVINO.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EngineError
from normistral.runtime.interpreter_exit import InterruptSafeLock
from normistral.runtime.kernels.library import BUILD, Library
from normistral.runtime.kernels.packed_store import (
    HUGE_PAGE,
    WORTH_BYTES,
    Bytes,
    allocate,
    drop_file_pages,
    find_key,
    load_packed,
)

if TYPE_CHECKING:
    import openvino as ov

OPERATOR, NUMBER = "Int4MatMul", "weights"  # as int4_matmul.cpp names itself
_STEP = 32  # as there: rows and groups are multiples of it
_LARGEST_GROUP = 128
_LINE = 64  # bytes of a cache line, which no load of codes crosses
_AGAIN = f"make it again: {BUILD}"
_MIDDLE = {4: 8, 8: 128}  # zero point of signed codes that have become unsigned
_SIGNED_TO_UNSIGNED = {4: 0x88888888, 8: 0x80808080}  # flips the upper bit of each code


class _Product(NamedTuple):
    """A MatMul node, and the constants that its weights are computed from."""

    node: Any
    codes: Any
    scales: Any
    zeros: Any | None

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return int(self.codes.get_element_type().bitwidth)

    @property
    def signed(self) -> bool:
        """Whether codes and zero points are."""
        return bool(self.codes.get_element_type().get_type_name().startswith("i"))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns, and scales of a row."""
        rows, *columns = self.codes.shape
        return rows, math.prod(columns), columns[0] if self.bits == 4 else 1


class PackedWeights:
    """The weights of a model's products in the kernel's layout, about as many bytes as before.

    They have to live as long as anything compiled that uses them: an operator that no longer finds its weights fails.
    For each product codes, scales and zero points lie behind each other; large ones in a file (packed_store).

    Args:
        products: of the model.
        key: of the file that is mapped; None where the weights are kept in memory only.

    Attributes:
        library: the kernel they are for, as a loader finds it.
        mapped: whether they lie in a file.
        numbers: by which operators find them, for each product by its name in the IR.
    """

    def __init__(
        self, library: Library, kernel: ctypes.CDLL, products: Sequence[_Product], key: bytes | None = None
    ) -> None:
        self.library = library.loadable
        self.numbers: dict[str, int] = {}
        size = sum(map(_packed_bytes, products))
        memory = None
        if key is not None:
            memory = load_packed(
                key, size, lambda: _pack_pieces(products, kernel), lambda data: _checksum(data, kernel)
            )
        self.mapped = memory is not None and not memory.flags.writeable  # else the file was copied, or there is none
        if memory is None:
            memory = allocate(size)
            for product, (start, stop) in _places(products):
                _pack(product, memory[start:stop], kernel)
        drop_file_pages(_raw(product.codes) for product in products)
        self._memory: Bytes = memory
        for product, (start, stop) in _places(products):
            rows, columns, groups = product.shape
            arrays = _split(product, memory[start:stop])
            # Activations have a scale for as many columns as weights of 4 bits; those of 8 bits have one scale a row.
            group = columns // groups if product.bits == 4 else math.gcd(columns, _LARGEST_GROUP)
            number = kernel.normistral_hold_int4(
                *(array.ctypes.data for array in arrays), rows, columns, group, product.bits
            )
            self.numbers[product.node.get_friendly_name()] = number
        weakref.finalize(self, _forget, kernel, list(self.numbers.values())).atexit = False


_shared: WeakValueDictionary[tuple[object, ...], PackedWeights] = WeakValueDictionary()
_sharing = InterruptSafeLock()


def pack_products(model: ov.Model, model_file: Path, library: Library, *, mapped: bool = False) -> PackedWeights | None:
    """The weights of a model as read from this file; a file that is loaded twice in one process is packed once.

    Args:
        library: the kernel, compiled for the installed OpenVINO, as it was checked.
        mapped: keep large ones in a file and map it: a load takes a third of the time, processes share them, and a
            token takes the same (benchmarks/results/2026-11-30-load.md).

    Returns:
        None where the kernel can do none of the products.

    Raises:
        EngineError: the library cannot be loaded.
    """
    stat = model_file.with_suffix(".bin").stat()
    key = (library, mapped, model_file.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    with _sharing:
        packed = _shared.get(key)
        if packed is None:
            products = list(_find_products(model))
            if not products:
                return None
            kernel = _open_library(library)
            size = sum(map(_packed_bytes, products))
            file_key = (
                find_key(model_file, kernel.normistral_int4_lanes(), size) if mapped and size >= WORTH_BYTES else None
            )
            packed = _shared[key] = PackedWeights(library, kernel, products, file_key)
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
        packs = (kernel.normistral_pack_int4, kernel.normistral_pack_int8)
        hold, forget = kernel.normistral_hold_int4, kernel.normistral_forget_int4
        checksum = kernel.normistral_checksum
    except (OSError, AttributeError) as exc:
        reason = str(exc).removeprefix(f"{library.loadable}: ")
        raise EngineError(f"cannot load {library.path.name}: {reason}", _AGAIN) from exc
    for pack in packs:
        pack.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32)
        pack.restype = None
    hold.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 4)
    forget.argtypes = (ctypes.c_int64,)
    checksum.argtypes, checksum.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    forget.restype = None
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
    if any(one.get_type_name() != "Constant" for one in constants):
        return False
    kinds = [one.get_element_type().get_type_name() for one in constants]
    if kinds[1] != "f16" or kinds[2:] not in ([], kinds[:1]) or (product.zeros is None and not product.signed):
        return False
    if kinds[0] in ("i4", "u4") and len(product.codes.shape) == 3:
        rows, groups, group = product.codes.shape
        wanted: tuple[int, ...] = (rows, groups, 1)
    elif kinds[0] in ("i8", "u8") and len(product.codes.shape) == 2:
        rows, group = product.codes.shape
        wanted = (rows, 1)
    else:
        return False
    return (
        all(tuple(one.shape) == wanted for one in constants[1:])
        and rows % _STEP == 0
        and group % _STEP == 0
        and (product.bits == 8 or group <= _LARGEST_GROUP)
    )


def _packed_bytes(product: _Product) -> int:
    rows, columns, groups = product.shape
    count = rows * columns * product.bits // 8 + rows * groups * 3  # two bytes of a scale and one of a zero point
    return int(-(-count // _LINE) * _LINE)


def _places(products: Sequence[_Product]) -> Iterator[tuple[_Product, tuple[int, int]]]:
    """Each product with the bytes where its packed weights begin and end."""
    stop = 0
    for product in products:
        start, stop = stop, stop + _packed_bytes(product)
        yield product, (start, stop)


def _split(product: _Product, memory: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    """Codes, scales and zero points of a product in its packed weights."""
    rows, columns, groups = product.shape
    codes, count = rows * columns * product.bits // 8, rows * groups
    return memory[:codes], memory[codes : codes + 2 * count], memory[codes + 2 * count : codes + 3 * count]


def _pack_pieces(products: Sequence[_Product], kernel: ctypes.CDLL) -> Iterator[Bytes]:
    """All packed weights in pieces of whole huge pages, the last excepted; one scratch memory serves them all."""
    scratch = allocate(max(map(_packed_bytes, products)) + HUGE_PAGE)
    end = 0
    for product in products:
        start, end = end, end + _packed_bytes(product)
        _pack(product, scratch[start:end], kernel)
        whole = end // HUGE_PAGE * HUGE_PAGE
        yield scratch[:whole]
        scratch[: end - whole] = scratch[whole:end].copy()
        end -= whole
    yield scratch[:end]


def _pack(product: _Product, memory: Bytes, kernel: ctypes.CDLL) -> None:
    """The weights of a product in the kernel's layout, in this memory."""
    rows, columns, groups = product.shape
    codes, scales, zeros = _split(product, memory)
    flip = _SIGNED_TO_UNSIGNED[product.bits] if product.signed else 0
    pack = kernel.normistral_pack_int4 if product.bits == 4 else kernel.normistral_pack_int8
    pack(_raw(product.codes).ctypes.data, codes.ctypes.data, rows, columns, flip)
    lanes = kernel.normistral_int4_lanes()
    _by_lanes(np.asarray(product.scales.data).reshape(rows, groups), scales.view(np.float16), lanes)
    middle = _MIDDLE[product.bits]
    if product.zeros is None:
        zeros[:] = middle
        return
    values = _raw(product.zeros)
    if product.bits == 4:
        values = np.stack([values & 15, values >> 4], axis=1).reshape(-1)[: rows * groups]
    _by_lanes((values ^ np.uint8(middle) if product.signed else values).reshape(rows, groups), zeros, lanes)


def _checksum(data: Bytes, kernel: ctypes.CDLL) -> int:
    return int(kernel.normistral_checksum(data.ctypes.data, data.size))


def _by_lanes(values: NDArray[Any], to: NDArray[Any], lanes: int) -> None:
    """[rows, groups] -> [rows / lanes, groups, lanes]."""
    rows, groups = values.shape
    to.reshape(rows // lanes, groups, lanes)[:] = values.reshape(rows // lanes, lanes, groups).transpose(0, 2, 1)


def _raw(constant: Any) -> Bytes:
    """The bytes of a constant; of 4-bit values two are in each."""
    return np.asarray(constant.data).view(np.uint8).reshape(-1)


def _source(node: Any, index: int) -> Any:
    return node.input_value(index).get_node()


def _skip(node: Any, *operators: str) -> Any:
    """The node behind others that change only type or shape."""
    while node.get_type_name() in operators:
        node = _source(node, 0)
    return node
