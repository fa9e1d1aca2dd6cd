"""The proof that needs no running: model.onnx can be read, has Optimum's signature, and all its weights are there."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from normistral.artifact.manifest import Manifest
from normistral.errors import ExportError
from normistral.export.checkpoint.config import read_json
from normistral.export.onnx.artifact import float_type
from normistral.export.onnx.graph import DATA_NAME, GRAPH_NAME
from normistral.export.onnx.signature import read_signature
from normistral.export.staging import require_free_disk


def check_structure(folder: Path, manifest: Manifest) -> None:
    """Inputs, outputs and the places of the weights.

    Args:
        folder: has config.json as well.

    Raises:
        ExportError: something is missing or has another shape.
        ResourceError: the disk is full.
    """
    from transformers import AutoConfig

    try:
        graph = onnx.load(folder / GRAPH_NAME, load_external_data=False).graph
    except DecodeError as exc:
        require_free_disk(folder)
        raise ExportError(f"the written {GRAPH_NAME} cannot be read again") from exc
    config = AutoConfig.for_model(**read_json(folder / "config.json"))
    signature = read_signature(config, manifest.architecture, float_type(manifest.recipe.weights))
    for kind, ports, values in (
        ("input", signature.inputs, graph.input),
        ("output", signature.outputs, graph.output),
    ):
        wanted = [port.value_info() for port in ports]
        for promised, found in zip(wanted, values, strict=False):
            if promised != found:
                raise ExportError(
                    f"the written model's {kind} {found.name} is not {onnx.helper.printable_value_info(promised)}"
                )
        if len(wanted) != len(values):
            raise ExportError(f"the written model has {len(values)} {kind}s instead of {len(wanted)}")
    size = (folder / DATA_NAME).stat().st_size
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            check_place(tensor, size)


def check_place(tensor: onnx.TensorProto, size: int) -> None:
    """A tensor lies whole in a data file of `size` bytes, and takes as many there as its type and shape say.

    Raises:
        ExportError: it does not.
    """
    where = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(where["offset"]), int(where["length"])
    needed = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if where["location"] != DATA_NAME or length != needed or not 0 <= offset <= offset + length <= size:
        raise ExportError(
            f"the weights {tensor.name} are not whole: bytes {offset} to {offset + length} of {size} in "
            f"{where['location']}, {needed} needed"
        )
