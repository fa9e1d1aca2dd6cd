"""Changes to an OpenVINO graph between reading and compiling; the IR on disk stays as other loaders expect it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from normistral.errors import EngineError
from normistral.runtime.engines.openvino_settings import translated

if TYPE_CHECKING:
    import openvino as ov

LAST = "last_positions"  # name of the input that `keep_last_logits` adds
POSITIONS = "logit_positions"  # and of that of `keep_logits_at`


def page_attention(model: ov.Model) -> None:
    """Replace attention and KV state of a stateful model by PagedAttention; tokens [n] then have no batch axis.

    Raises:
        EngineError: this OpenVINO has no such transformation, or the model is not of the form that it takes.
    """
    try:
        from openvino._offline_transformations import paged_attention_transformation
    except ImportError as exc:
        raise EngineError("this OpenVINO has no PagedAttention", "install the version that normistral pins") from exc
    with translated("OpenVINO cannot page this model's attention"):
        paged_attention_transformation(model)


def keep_last_logits(model: ov.Model) -> None:
    """Compute the output layer for the last positions only, as many as the new input `last_positions` [1] says.

    The exported IR computes logits of every position, as other loaders expect: for a prompt of 1,500 tokens that is
    a large product and 200 MB that are not read. Hidden states are [1, n, hidden].

    Raises:
        EngineError: the logits do not come from a matrix product.
    """
    import openvino as ov
    from openvino import opset13 as ops

    layer = _output_layer(model)
    last = ops.parameter([1], ov.Type.i64, name=LAST)
    start, stop = ops.negative(last), ops.constant(np.array([2**31 - 1], np.int64))
    step, along = ops.constant(np.array([1], np.int64)), ops.constant(np.array([1], np.int64))
    _replace_hidden(model, layer, last, ops.slice(layer.input_value(0), start, stop, step, along))


def keep_logits_at(model: ov.Model) -> None:
    """Compute the output layer for the positions that the new input `logit_positions` [m] names.

    For a model after `page_attention`, whose positions are those of all sequences of a forward, one after the other:
    hidden states are [n, 1, hidden], logits [m, 1, vocabulary].

    Raises:
        EngineError: the logits do not come from a matrix product.
    """
    import openvino as ov
    from openvino import opset13 as ops

    layer = _output_layer(model)
    positions = ops.parameter([-1], ov.Type.i64, name=POSITIONS)
    kept = ops.gather(layer.input_value(0), positions, ops.constant(np.array(0, np.int64)))
    _replace_hidden(model, layer, positions, kept)


def _output_layer(model: ov.Model) -> Any:
    output_layer: Any = model.output("logits").get_node().input_value(0).get_node()
    while output_layer.get_type_name() in ("Convert", "Add"):
        output_layer = output_layer.input_value(0).get_node()
    if output_layer.get_type_name() != "MatMul":
        raise EngineError(f"the model's logits come from {output_layer.get_type_name()}, not from a matrix product")
    return output_layer


def _replace_hidden(model: ov.Model, output_layer: Any, parameter: Any, kept: Any) -> None:
    parameter.output(0).get_tensor().set_names({parameter.get_friendly_name()})
    output_layer.input(0).replace_source_output(kept.output(0))
    model.add_parameters([parameter])
    model.validate_nodes_and_infer_types()
