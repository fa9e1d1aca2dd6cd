"""Quantized matrices in the place of NNCF's constants.

Run as a program, it prints by how many matrices the memory grows while they are replaced.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from normistral.evaluation.bench.machine import read_process_memory
from normistral.export.openvino_weights import replace_weights
from normistral.export.quantize.scheme import QuantizedTensor, QuantScheme

ROWS, COLUMNS, GROUP, MATRICES = 1024, 16384, 128, 32
MATRIX_BYTES = ROWS * COLUMNS // 2


def compressed_graph():
    """Int4 products in a chain, as NNCF names them."""
    x = ops.parameter([1, COLUMNS], ov.Type.f32)
    groups, sums = COLUMNS // GROUP, []
    for number in range(MATRICES):
        name = f"self.model.layers.{number}.mlp.up_proj.weight"
        zeros = np.zeros(MATRIX_BYTES, np.uint8)
        shape = ov.Shape([ROWS, groups, GROUP])
        codes = ov.op.Constant(ov.Tensor(zeros, shape, ov.Type.i4), shared_memory=False)
        scales = ops.constant(np.ones((ROWS, groups, 1), np.float16))
        codes.set_friendly_name(name)
        scales.set_friendly_name(f"{name}/scale")
        weights = ops.multiply(ops.convert(codes, "f16"), scales)
        weights = ops.reshape(weights, ops.constant(np.array([ROWS, COLUMNS])), False)
        sums.append(ops.matmul(x, ops.convert(weights, "f32"), False, True))
    return ov.Model(sums, [x])


class Store:
    """Matrices that are made as they are read; notes the anonymous memory at each."""

    def __init__(self):
        scheme = QuantScheme(4, GROUP, symmetric=True, float16_scales=True)
        self.schemes = {f"model.layers.{number}.mlp.up_proj.weight": scheme for number in range(MATRICES)}
        self.memory: list[int] = []

    def read(self, name):
        self.memory.append(read_process_memory().anonymous)
        rows = np.full((ROWS, COLUMNS // 2), 0x99, np.uint8)
        return QuantizedTensor(rows, np.full((ROWS, COLUMNS // GROUP), 0.5, np.float32), None)


def test_memory_of_replaced_constants_is_the_systems_again():
    """As a program, because pytest's own heap has holes that new constants would fill."""
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 3  # of 32


def test_what_takes_their_place_is_what_was_quantized():
    graph = compressed_graph()
    replace_weights(graph, Store())
    codes = [node for node in graph.get_ops() if node.get_friendly_name().endswith("proj.weight")]
    assert len(codes) == MATRICES
    assert all((np.asarray(node.data).view(np.uint8) == 0x11).all() for node in codes)  # 9 is 8 + 1


def grown_matrices():
    """Anonymous memory while they are replaced, at its highest less at its start, in matrices."""
    store = Store()
    replace_weights(compressed_graph(), store)
    return (max(store.memory) - store.memory[0]) / MATRIX_BYTES


if __name__ == "__main__":
    print(grown_matrices())
