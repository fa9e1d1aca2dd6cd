"""Inputs, outputs and dynamic axes of a decoder, as Optimum's ONNX configuration names them.

Both graphs have this signature, so that whatever opens Optimum's exports opens ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx

from normistral.artifact.manifest import Architecture
from normistral.export.tools import with_plain_partials

TASK = "text-generation-with-past"
Axis = int | str


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output: a name, a TensorProto.DataType, and for every axis its size or its name."""

    name: str
    dtype: int
    shape: tuple[Axis, ...]

    def value_info(self) -> onnx.ValueInfoProto:
        """The declaration in the graph."""
        return onnx.helper.make_tensor_value_info(self.name, self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a decoder; `opset` is the one that Optimum exports this architecture with."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int


def export_config(config: Any) -> Any:
    """Optimum's ONNX configuration for a decoder with past keys and values among its inputs.

    Args:
        config: the transformers configuration.
    """
    import optimum.exporters.onnx.model_configs  # noqa: F401  (registers them)
    from optimum.exporters.tasks import TasksManager

    constructor = TasksManager.get_exporter_config_constructor(
        exporter="onnx", model_type=config.model_type, task=TASK, library_name="transformers"
    )
    kind = with_plain_partials(constructor.func)
    return kind(config, task="text-generation", use_past=True, use_past_in_inputs=True)


def _is_past(name: str) -> bool:
    return name.startswith("past_key_values.")


def read_signature(config: Any, architecture: Architecture, float_type: int) -> Signature:
    """The signature of a decoder.

    Keys and values are [batch_size, KV heads, past_sequence_length, head_dim]. Where head_dim is not
    hidden_size/heads, it is left open: ORTModelForCausalLM then passes an empty past of another width. They come
    last, as in the files that Optimum writes.

    Args:
        float_type: TensorProto.DataType of keys, values and logits.
    """
    optimum = export_config(config)

    def port(name: str, axes: dict[int, str]) -> Port:
        if name == "logits":
            return Port(name, float_type, (axes[0], axes[1], architecture.vocabulary))
        if name.endswith((".key", ".value")):
            odd = architecture.head_dim * architecture.heads != architecture.hidden_size
            width: Axis = "head_dim" if odd and name.startswith("past") else architecture.head_dim
            return Port(name, float_type, (axes[0], architecture.kv_heads, axes[2], width))
        return Port(name, onnx.TensorProto.INT64, (axes[0], axes[1]))

    return Signature(
        tuple(port(name, optimum.inputs[name]) for name in sorted(optimum.inputs, key=_is_past)),
        tuple(port(name, axes) for name, axes in optimum.outputs.items()),
        optimum.DEFAULT_ONNX_OPSET,
    )
