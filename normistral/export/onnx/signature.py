"""Inputs, outputs and dynamic axes of a decoder, as Optimum's ONNX configuration names them; and their verification.

Both graphs have this signature, so that whatever opens Optimum's exports opens these. The verification runs nothing: it
reads model.onnx, compares the signature, and checks that all weights are in the data file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from normistral.artifact.manifest import Architecture, Manifest
from normistral.artifact.presets import WeightFormat
from normistral.errors import ExportError
from normistral.export.checkpoint.files import read_json
from normistral.export.staging import require_free_disk
from normistral.export.tools import export_config

GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a decoder; `opset` is the one that Optimum exports this architecture with."""

    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]
    opset: int


def float_type(weights: WeightFormat) -> int:
    """TensorProto.DataType of keys, values and logits."""
    return onnx.TensorProto.FLOAT16 if weights == "fp16" else onnx.TensorProto.FLOAT


def read_signature(config: Any, architecture: Architecture, float_type: int) -> Signature:
    """The signature of a decoder.

    Keys and values are [batch_size, KV heads, past_sequence_length, head_dim]. Where head_dim is not
    hidden_size/heads, it is left open: ORTModelForCausalLM then passes an empty past of another width. They come
    last, as in the files that Optimum writes.

    Args:
        float_type: TensorProto.DataType of keys, values and logits.
    """
    optimum = export_config("onnx", config)

    make = onnx.helper.make_tensor_value_info

    def port(name: str, axes: dict[int, str]) -> onnx.ValueInfoProto:
        if name == "logits":
            return make(name, float_type, (axes[0], axes[1], architecture.vocabulary))
        if name.endswith((".key", ".value")):
            odd = architecture.head_dim * architecture.heads != architecture.hidden_size
            width = "head_dim" if odd and name.startswith("past") else architecture.head_dim
            return make(name, float_type, (axes[0], architecture.kv_heads, axes[2], width))
        return make(name, onnx.TensorProto.INT64, (axes[0], axes[1]))

    past_last = sorted(optimum.inputs, key=lambda name: name.startswith("past_key_values."))
    return Signature(
        tuple(port(name, optimum.inputs[name]) for name in past_last),
        tuple(port(name, axes) for name, axes in optimum.outputs.items()),
        optimum.DEFAULT_ONNX_OPSET,
    )


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
    for kind, wanted, values in (
        ("input", signature.inputs, graph.input),
        ("output", signature.outputs, graph.output),
    ):
        for promised, found in zip(wanted, values, strict=False):
            if promised != found:
                raise ExportError(
                    f"the written model's {kind} {found.name} is not {onnx.helper.printable_value_info(promised)}"
                )
        if len(wanted) != len(values):
            raise ExportError(f"the written model has {len(values)} {kind}s instead of {len(wanted)}")
    size = (folder / DATA_NAME).stat().st_size
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(where["offset"]), int(where["length"])
        needed = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if where["location"] != DATA_NAME or length != needed or not 0 <= offset <= offset + length <= size:
            raise ExportError(
                f"the weights {tensor.name} are not whole: bytes {offset} to {offset + length} of {size} in "
                f"{where['location']}, {needed} needed"
            )
