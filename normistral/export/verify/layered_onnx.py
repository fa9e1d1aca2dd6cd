"""Running a fused ONNX graph layer by layer, for a proof in the memory of one layer.

The graph is cut behind every attention node. The pieces hold the file's own nodes and read the file's own bytes. Each
is a session of onnxruntime that is opened, run over all sequences and closed. What later pieces read waits in memory:
a megabyte for 64 tokens of a 7B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from normistral import hardware
from normistral.artifact.manifest import Architecture, Manifest
from normistral.runtime.engines.base import Logits
from normistral.runtime.engines.onnx_graph import ATTENTION, LOGITS, LOGITS_START
from normistral.runtime.engines.onnx_session import open_session, session_options, translated
from normistral.runtime.engines.onnxruntime import PAST, PRESENT, adapt_graph, read_graph
from normistral.runtime.providers import find_target

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_EXACT_LEVEL = "1"  # of MatMulNBits: products in float32

Tensors = dict[str, NDArray[Any]]  # by their names in the graph


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive nodes.

    Attributes:
        inputs: tensors that they read and neither compute nor find among the weights.
        outputs: tensors of theirs that are read after them.
        cached: those of the inputs that are past keys and values.
        finished: the others of them that no later piece reads.
    """

    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]
    cached: list[str]
    finished: list[str]


def run_layered(folder: Path, manifest: Manifest, sequences: Sequence[Sequence[Sequence[int]]]) -> list[Logits]:
    """Logits [tokens, vocabulary] of each sequence, with exact arithmetic on the CPU.

    Args:
        sequences: each in parts that are fed one after the other, on the KV cache of those before.

    Raises:
        ArtifactError: the graph cannot be read.
        EngineError: onnxruntime could not load or run a piece.
    """
    graph = read_graph(folder, manifest)
    adapt_graph(graph, _EXACT_LEVEL)
    model = onnx.load_model_from_string(bytes(graph))
    runs = [_graph_inputs(parts) for parts in sequences]
    # Without an arena, which would keep what a piece has taken.
    settings = {**hardware.plan_onnxruntime(hardware.read_machine()), "enable_cpu_mem_arena": "0"}
    options = session_options(settings, folder)
    target = find_target("CPU", ["CPUExecutionProvider"], exact=True)
    empty = _empty_cache(model.graph, manifest.architecture)
    for piece in cut_at_attention(model.graph):
        examples = runs[0][0] | dict.fromkeys(piece.cached, empty)
        session = open_session(_model_of(model, piece, examples), options, target, folder.name)
        for parts in runs:
            _run_piece(session, piece, parts, empty)
    return [np.concatenate([part[LOGITS][0] for part in parts]).astype(np.float32) for parts in runs]


def cut_at_attention(graph: onnx.GraphProto) -> list[_Piece]:
    """Pieces of a graph whose nodes are in order, cut behind every attention node."""
    ends = [index + 1 for index, node in enumerate(graph.node) if node.op_type == ATTENTION]
    bounds = [0, *ends, len(graph.node)]
    weights = {tensor.name for tensor in graph.initializer}
    read_later = {port.name for port in graph.output}
    pieces = []
    for start, end in zip(reversed(bounds[:-1]), reversed(bounds[1:]), strict=True):
        nodes = list(graph.node[start:end])
        computed = [name for node in nodes for name in node.output if name]
        inputs = {name for node in nodes for name in node.input if name} - weights - set(computed)
        outputs = [name for name in computed if name in read_later]
        cached = sorted(name for name in inputs if name.startswith(PAST))
        pieces.append(_Piece(nodes, sorted(inputs), outputs, cached, sorted(inputs - read_later - set(cached))))
        read_later |= inputs
    return pieces[::-1]


def _graph_inputs(parts: Sequence[Sequence[int]]) -> list[Tensors]:
    """Everything but the KV cache, for each part of a sequence."""
    ends = np.cumsum([len(part) for part in parts])
    return [
        {
            "input_ids": np.array([part], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(end - len(part), end, dtype=np.int64)[None],
            LOGITS_START: np.array([-len(part)], np.int64),
        }
        for part, end in zip(parts, ends, strict=True)
    ]


def _empty_cache(graph: onnx.GraphProto, architecture: Architecture) -> NDArray[Any]:
    """Past keys or values of a layer before the first token."""
    float_type = next(port.type.tensor_type.elem_type for port in graph.input if port.name.startswith(PAST))
    dtype = helper.tensor_dtype_to_np_dtype(float_type)
    return np.zeros((1, architecture.kv_heads, 0, architecture.head_dim), dtype)


def _run_piece(session: InferenceSession, piece: _Piece, parts: Sequence[Tensors], empty: NDArray[Any]) -> None:
    """Run one piece over the parts of a sequence: their tensors gain what it computes, and lose what is finished."""
    cache = dict.fromkeys(piece.cached, empty)
    for tensors in parts:
        feeds = {name: cache[name] if name in cache else tensors[name] for name in piece.inputs}
        with translated("onnxruntime failed in a layer"):
            found = dict(zip(piece.outputs, session.run(piece.outputs, feeds), strict=True))
        cache = {name: found.pop(name.replace(PAST, PRESENT)) for name in piece.cached}
        for name in piece.finished:
            del tensors[name]
        tensors |= found


def _model_of(model: onnx.ModelProto, piece: _Piece, examples: Tensors) -> bytes:
    """A model of one piece; the examples say of which type its inputs are."""
    names = {name for node in piece.nodes for name in node.input}
    graph = helper.make_graph(
        piece.nodes,
        "piece",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(examples[name].dtype), None)
            for name in piece.inputs
        ],
        [onnx.ValueInfoProto(name=name) for name in piece.outputs],
        [tensor for tensor in model.graph.initializer if tensor.name in names],
    )
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(made.SerializeToString())
