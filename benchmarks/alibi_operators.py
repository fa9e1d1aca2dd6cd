"""Which of onnxruntime's attention operators carry ALiBi beside a KV cache, how exactly, and how fast.

One layer of NorBLOOM's attention (32 heads of 128, as many for keys and values), without its projections: one new token
or a piece of a prompt on a cache of some length. Every operator gets the same numbers and is compared with numpy.

    python benchmarks/alibi_operators.py [--past 256 1024 2000] [--new 1 256] [--repeats 7] > RESULT.json

Variants run in turn, round after round; times are medians in milliseconds for one layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from normistral.export.onnx.bloom import slopes

HEADS, WIDTH = 32, 128
CAPACITY = 2560  # positions of a shared buffer
MICROSOFT = "com.microsoft"
Arrays = dict[str, Any]


@dataclass
class Problem:
    """Queries, keys and values of the new tokens [1, n, H d]; the cache [1, H, past, d]; the bias [1, H, n, total]."""

    q: Any
    k: Any
    v: Any
    past_k: Any
    past_v: Any
    bias: Any

    @property
    def new(self) -> int:
        return int(self.q.shape[1])

    @property
    def past(self) -> int:
        return int(self.past_k.shape[2])


def make_problem(past: int, new: int) -> Problem:
    noise = np.random.default_rng(0)
    flat, cache = (1, new, HEADS * WIDTH), (1, HEADS, past, WIDTH)
    q, k, v = (noise.standard_normal(flat, np.float32) for _ in range(3))
    past_k, past_v = (noise.standard_normal(cache, np.float32) for _ in range(2))
    distances = np.arange(past + new)[None, :] - np.arange(past, past + new)[:, None]
    bias = (slopes(HEADS)[:, None, None] * distances).astype(np.float32)[None]
    return Problem(q, k, v, past_k, past_v, bias)


def by_heads(flat: Any) -> Any:
    """[1, n, H d] as [1, H, n, d]."""
    return flat.reshape(1, -1, HEADS, WIDTH).swapaxes(1, 2)


def reference(problem: Problem) -> Any:
    """What all of them should compute: [1, n, H d], in float64."""
    q, k, v = (by_heads(part).astype(np.float64) for part in (problem.q, problem.k, problem.v))
    k, v = np.concatenate([problem.past_k, k], axis=2), np.concatenate([problem.past_v, v], axis=2)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(WIDTH) + problem.bias
    future = np.arange(k.shape[2])[None, :] > problem.past + np.arange(problem.new)[:, None]
    scores[:, :, future] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v).swapaxes(1, 2).reshape(1, -1, HEADS * WIDTH)


def grouped(problem: Problem, *, shared: bool, biased: bool = True) -> Iterator[Callable[[], Any]]:
    """GroupQueryAttention; with `shared`, past and present are one buffer."""
    inputs = ["qkv", "", "", "past_k", "past_v", "last", "total", "", "", "", "bias" if biased else ""]
    attributes = {"num_heads": HEADS, "kv_num_heads": HEADS, "scale": WIDTH**-0.5}
    node = helper.make_node("GroupQueryAttention", inputs, ["y", "k", "v"], domain=MICROSOFT, **attributes)
    total = problem.past + problem.new
    feeds = {
        "qkv": np.concatenate([problem.q, problem.k, problem.v], axis=2),
        "last": np.array([total - 1], np.int32),
        "total": np.array(total, np.int32),
    } | ({"bias": problem.bias} if biased else {})
    caches = {name: (past, out) for name, past, out in cache_ports(problem)}
    yield bound(node, feeds, caches, shared=shared, total=total)


def multi_head(problem: Problem) -> Iterator[Callable[[], Any]]:
    """MultiHeadAttention, which returns a longer copy of the cache."""
    inputs = ["q", "k_new", "v_new", "", "", "bias", "past_k", "past_v"]
    attributes = {"num_heads": HEADS, "scale": WIDTH**-0.5, "unidirectional": 1}
    node = helper.make_node("MultiHeadAttention", inputs, ["y", "k", "v"], domain=MICROSOFT, **attributes)
    feeds = {"q": problem.q, "k_new": problem.k, "v_new": problem.v, "bias": problem.bias}
    yield bound(node, feeds, {n: (p, o) for n, p, o in cache_ports(problem)}, total=problem.past + problem.new)


def masked(problem: Problem, *, shared: bool) -> Iterator[Callable[[], Any]]:
    """DecoderMaskedMultiHeadAttention: one new token; past and present are one buffer if `shared`."""
    inputs = ["q", "k_new", "v_new", "", "bias", "past_k", "past_v", *(["past_length"] if shared else [])]
    attributes = {"num_heads": HEADS, "scale": WIDTH**-0.5, "past_present_share_buffer": int(shared)}
    node = helper.make_node("DecoderMaskedMultiHeadAttention", inputs, ["y", "k", "v"], domain=MICROSOFT, **attributes)
    feeds = {"q": problem.q, "k_new": problem.k, "v_new": problem.v, "bias": problem.bias}
    if shared:
        feeds["past_length"] = np.array([problem.past], np.int32)
    caches = {n: (p, o) for n, p, o in cache_ports(problem)}
    yield bound(node, feeds, caches, shared=shared, total=problem.past + problem.new)


def standard(problem: Problem, opset: int) -> Iterator[Callable[[], Any]]:
    """Attention of the ONNX standard, which returns a longer copy of the cache."""
    inputs = ["q", "k_new", "v_new", "bias", "past_k", "past_v"]
    attributes = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "scale": WIDTH**-0.5, "is_causal": 1}
    node = helper.make_node("Attention", inputs, ["y", "k", "v"], **attributes)
    feeds = {"q": problem.q, "k_new": problem.k, "v_new": problem.v, "bias": problem.bias}
    caches = {n: (p, o) for n, p, o in cache_ports(problem)}
    yield bound(node, feeds, caches, total=problem.past + problem.new, opset=opset)


VARIANTS: dict[str, Callable[[Problem], Iterator[Callable[[], Any]]]] = {
    "GroupQueryAttention, shared buffer": lambda problem: grouped(problem, shared=True),
    "GroupQueryAttention, copies": lambda problem: grouped(problem, shared=False),
    "GroupQueryAttention, shared buffer, no bias": lambda problem: grouped(problem, shared=True, biased=False),
    "MultiHeadAttention, copies": multi_head,
    "DecoderMaskedMultiHeadAttention, shared buffer": lambda problem: masked(problem, shared=True),
    "DecoderMaskedMultiHeadAttention, copies": lambda problem: masked(problem, shared=False),
    "Attention-23, copies": lambda problem: standard(problem, 23),
    "Attention-24, copies": lambda problem: standard(problem, 24),
}


def cache_ports(problem: Problem) -> list[tuple[str, Any, str]]:
    return [("past_k", problem.past_k, "k"), ("past_v", problem.past_v, "v")]


def bound(
    node: onnx.NodeProto,
    feeds: Arrays,
    caches: dict[str, tuple[Any, str]],
    *,
    total: int,
    shared: bool = False,
    opset: int = 21,
) -> Callable[[], Any]:
    """A session of one node, its inputs and outputs bound once; calling it runs it and returns y."""
    buffers: dict[str, Any] = {}
    for name, (past, _) in caches.items():
        length = CAPACITY if shared else past.shape[2]
        buffers[name] = np.zeros((1, HEADS, length, WIDTH), np.float32)
        buffers[name][:, :, : past.shape[2]] = past
    arrays = feeds | buffers
    dtypes = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
    ports = [helper.make_tensor_value_info(n, dtypes[a.dtype], list(a.shape)) for n, a in arrays.items()]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "k", "v")]
    graph = helper.make_graph([node], "attention", ports, outputs)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    present = (
        {out: values[name] for name, (_, out) in caches.items()}
        if shared
        else {
            out: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, HEADS, total, WIDTH), np.float32))
            for _, out in caches.values()
        }
    )
    for name, value in present.items():
        binding.bind_ortvalue_output(name, value)
    binding.bind_output("y", "cpu")

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[2]

    return run


def measure(past: int, new: int, repeats: int) -> list[Arrays]:
    problem = make_problem(past, new)
    expected = reference(problem)
    rows, ready = [], {}
    for name, make in VARIANTS.items():
        try:
            run = next(make(problem))
            found = run().numpy().reshape(expected.shape)
        except Exception as exc:
            rows.append({"operator": name, "past": past, "new": new, "refused": str(exc).splitlines()[0][:160]})
            continue
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        ready[name] = (run, error)
    calls = 20 if new == 1 else 2
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, (run, _) in ready.items():
            run()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append(1000 * (time.perf_counter() - start) / calls)
    for name, (_, error) in ready.items():
        spread = [round(min(times[name]), 3), round(max(times[name]), 3)]
        row = {"operator": name, "past": past, "new": new, "ms": round(statistics.median(times[name]), 3)}
        rows.append(row | {"spread": spread, "error": float(f"{error:.2g}")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--past", type=int, nargs="+", default=[256, 1024, 2000])
    parser.add_argument("--new", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    rows = [row for new in arguments.new for past in arguments.past for row in measure(past, new, arguments.repeats)]
    for row in rows:
        print(row, file=sys.stderr)
    print(json.dumps({"onnxruntime": onnxruntime.__version__, "threads": os.cpu_count(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
