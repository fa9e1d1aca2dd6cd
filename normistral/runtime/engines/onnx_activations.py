"""Activations of 8-bit matrices in two int8 parts instead of one: a change of the ONNX graph at load.

MatMulNBits at accuracy level 4 rounds activations to int8, with a scale for as many of them as share a scale of the
weights. Beside 8-bit weights that is most of the loss: one large activation makes its whole block coarse. At level 1
nothing is rounded, but onnxruntime 1.32 then unpacks the whole matrix for every token. Here what the rounding leaves is
multiplied too: x W = hi W + lo W, hi = round(x / s) s, lo = x - hi, each exact to its own int8. Both parts are rows of
one product, so that the weights are read once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from normistral.runtime.engines.onnx_graph import (
    QUANTIZED_PRODUCT,
    Node,
    OnnxGraph,
    drop_empty_inputs,
    get_int,
    make_node,
)

INT8_LEVEL = 4  # the accuracy level that rounds activations
_OPSET = 18  # axes are inputs of ReduceMax
_LARGEST_INT8 = 127
_BIAS = 5  # the input of MatMulNBits
_LEAST_STEP = 1e-30  # of a block of zeros


def can_split(graph: OnnxGraph) -> bool:
    """Whether all products of quantized weights have 8 bits, and the graph knows the operators used here.

    Beside weights of 4 bits, what activations lose is nothing.
    """
    products = [node for node in graph.nodes if node.op_type == QUANTIZED_PRODUCT]
    return graph.opset() >= _OPSET and bool(products) and all(map(_is_of_8_bits, products))


def split_activations(graph: OnnxGraph) -> None:
    """Multiply the activations of quantized weights in two parts, for a batch of one sequence; see `can_split`."""
    splitter = _Splitter(graph)
    for node in [node for node in graph.nodes if node.op_type == QUANTIZED_PRODUCT]:
        splitter.split(node)


def _is_of_8_bits(node: Node) -> bool:
    """Whether a product is of 8-bit weights whose blocks fill their rows."""
    block = get_int(node, "block_size")
    return get_int(node, "bits") == 8 and block > 0 and get_int(node, "K") % block == 0


@dataclass(slots=True)
class _Splitter:
    graph: OnnxGraph
    parts: dict[tuple[str, int], str] = field(default_factory=dict)  # of an input, which several products may read

    def split(self, node: Node) -> None:
        output, (bias,) = node.output[0], node.input[_BIAS:] or [""]
        node.input[:] = [self._parts(node), *node.input[1:_BIAS]]
        drop_empty_inputs(node)
        node.output[:] = [f"{output}.parts"]  # [2, n, N]
        total = f"{output}.unbiased" if bias else output
        after = [make_node("ReduceSum", [f"{output}.parts", self._ints("parts.first_axis", 0)], total)]
        if bias:  # once, not with each part
            after.append(make_node("Add", [total, bias], output))
        place = self.graph.place(node) + 1
        self.graph.nodes[place:place] = after

    def _parts(self, node: Node) -> str:
        """Both parts of a product's input [1, n, K], one behind the other: [2, n, K]."""
        x, columns, block = node.input[0], get_int(node, "K"), get_int(node, "block_size")
        if (x, block) in self.parts:
            return self.parts[x, block]

        def add(operator: str, inputs: list[str], name: str, **attributes: int) -> str:
            return self.graph.add_node(node, operator, inputs, f"{x}.{name}{block}", **attributes)

        blocks = add("Reshape", [x, self._ints(f"parts.blocks{block}", -1, block)], "blocks")
        largest = add("ReduceMax", [add("Abs", [blocks], "sizes"), self._ints("parts.last_axis", 1)], "largest")
        step = add("Mul", [largest, self._float("parts.step", 1 / _LARGEST_INT8)], "step")
        step = add("Max", [step, self._float("parts.least_step", _LEAST_STEP)], "positive_step")
        high = add("Mul", [add("Round", [add("Div", [blocks, step], "steps")], "rounded"), step], "high")
        both = add("Concat", [high, add("Sub", [blocks, high], "low")], "both", axis=0)
        parts = add("Reshape", [both, self._ints(f"parts.rows{columns}", 2, -1, columns)], "parts")
        self.parts[x, block] = parts
        return parts

    def _ints(self, name: str, *values: int) -> str:
        return self.graph.add_constant(name, np.array(values, np.int64))

    def _float(self, name: str, value: float) -> str:
        return self.graph.add_constant(name, np.array(value, np.float32))
