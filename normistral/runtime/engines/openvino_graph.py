"""Changes to an OpenVINO graph between reading and compiling; the IR on disk stays as other loaders expect it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from normistral.errors import EngineError
from normistral.runtime.engines.openvino_settings import translated

if TYPE_CHECKING:
    import openvino as ov

LAST = "last_positions"  # name of the input that `keep_last_logits` adds


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


def keep_last_logits(model: ov.Model, axis: int = 1) -> None:
    """Compute the output layer for the last positions only, as many as the new input `last_positions` [1] says.

    The exported IR computes logits of every position, as other loaders expect: for a prompt of 1,500 tokens that is
    a large product and 200 MB that are not read.

    Args:
        axis: of the positions in the hidden states: [1, n, hidden], or [n, 1, hidden] after `page_attention`.

    Raises:
        EngineError: the logits do not come from a matrix product.
    """
    import openvino as ov
    from openvino import opset13 as ops

    output_layer: Any = model.output("logits").get_node().input_value(0).get_node()
    while output_layer.get_type_name() in ("Convert", "Add"):
        output_layer = output_layer.input_value(0).get_node()
    if output_layer.get_type_name() != "MatMul":
        raise EngineError(f"the model's logits come from {output_layer.get_type_name()}, not from a matrix product")
    last = ops.parameter([1], ov.Type.i64, name=LAST)
    last.output(0).get_tensor().set_names({LAST})
    start, stop = ops.negative(last), ops.constant(np.array([2**31 - 1], np.int64))
    step, along = ops.constant(np.array([1], np.int64)), ops.constant(np.array([axis], np.int64))
    hidden = output_layer.input_value(0)
    output_layer.input(0).replace_source_output(ops.slice(hidden, start, stop, step, along).output(0))
    model.add_parameters([last])
    model.validate_nodes_and_infer_types()
