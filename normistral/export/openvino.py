"""Conversion to OpenVINO IR: transformers model → traced, stateful graph → rounded weights → files.

The export configuration, the patches that make a model traceable and the stateful KV cache are Optimum's. Its
`export_from_model` is not used: it writes the whole checkpoint out as a bf16 IR and reads that back before NNCF rounds
it. Here NNCF rounds the traced graph itself, whose constants are the memory-mapped weight files: no temporary copy of
the weights, neither on disk nor in memory.

It does not know the artifact's other files.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normistral.artifact.manifest import Architecture
from normistral.errors import ExportError, first_line
from normistral.export.job import ExportJob
from normistral.export.openvino_weights import replace_weights
from normistral.export.quantize.rtn import quantize_remaining
from normistral.export.quantize.scheme import QuantScheme
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.export.recipe import Recipe
from normistral.export.reference.model import load_model
from normistral.export.staging import require_free_disk
from normistral.export.tools import export_config
from normistral.progress import Stage

if TYPE_CHECKING:
    import openvino
    import torch
    from transformers import PreTrainedModel

IR_NAME = "openvino_model.xml"
_XML_BYTES = 2**22  # more than the graph of a 7B takes without its weights


def write_model(job: ExportJob, quantized: QuantizedTensorStore | None) -> None:
    """Write the IR; torch and its memory-mapped weights are released on return.

    Args:
        quantized: matrices that a calibration has quantized already.
    """
    checkpoint, recipe, staging, progress = job.checkpoint, job.recipe, job.staging, job.progress
    with progress.stage("loading the model"):
        model = load_model(checkpoint)
    if recipe.weights == "fp16":
        with progress.stage("rounding to float16"):
            cast_to_float16(model, staging.workspace / "float16")
    with progress.stage("converting to OpenVINO"):
        graph = convert(model)
    if recipe.weights != "fp16":
        with progress.stage(f"compressing to {recipe.weights}") as compressing:
            graph = compress(graph, recipe, job.group_size, compressing)
            if recipe.weights == "int8" and job.group_size is not None:
                if quantized is None:
                    (staging.workspace / "rounded").mkdir()
                    quantized = QuantizedTensorStore(staging.workspace / "rounded")
                quantize_remaining(
                    checkpoint, QuantScheme(8, job.group_size, recipe.is_symmetric, float16_scales=True), quantized
                )
            if quantized is not None:
                replace_weights(graph, quantized)
    with progress.stage("saving"):
        save(graph, staging.artifact, recipe)


def cast_to_float16(model: PreTrainedModel, file: Path) -> None:
    """Replace the matrices of `model` by their float16 rounding, kept in a memory-mapped `file`.

    Takes 2 bytes of disk per weight and next to no memory. Vectors (norms) stay as they are.
    """
    import torch

    matrices = [tensor for tensor in model.parameters() if tensor.ndim >= 2]
    total = sum(tensor.numel() for tensor in matrices)
    rounded = torch.from_file(str(file), shared=True, size=total, dtype=torch.float16)
    start = 0
    with torch.no_grad():
        for parameter in matrices:
            view = rounded[start : start + parameter.numel()].view(parameter.shape)
            parameter.data = view.copy_(parameter)
            start += parameter.numel()


def convert(model: PreTrainedModel) -> openvino.Model:
    """Trace a decoder into a stateful OpenVINO graph.

    Inputs are input_ids, attention_mask, position_ids (not with ALiBi) [batch, tokens] and beam_idx [batch], the output
    is logits float32 [batch, tokens, vocabulary]; keys and values live in variables float32 [batch, KV heads, past,
    head_dim].
    The graph's large constants are the model's own memory: keep `model` until the graph is saved.

    Follows `optimum.exporters.openvino.convert.export_pytorch` (optimum-intel 1.27), without its save.

    Raises:
        ExportError: Optimum or OpenVINO cannot convert it.
    """
    import openvino
    import torch
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    from optimum.exporters.openvino.stateful import patch_stateful
    from optimum.exporters.openvino.utils import _get_input_info

    model.config.return_dict = True
    try:
        config = export_config("openvino", model.config)
        inputs = config.rename_ambiguous_inputs(config.generate_dummy_inputs(framework="pt"))
        patcher = config.patch_model_for_export(model)
        patcher.patched_forward = _positional(patcher.patched_forward, patcher.orig_forward, inputs)
        with torch.no_grad(), patcher, _traceable_in_16_bits(model):
            signature = _get_input_info(model, config, inputs)
            # TorchScript would trace a second time to compare; verify.py compares with the model itself.
            decoder = TorchScriptPythonDecoder(model, example_input=inputs, trace_kwargs={"check_trace": False})
            graph = openvino.convert_model(
                decoder, example_input=inputs, input=[(item.shape, item.type) for item in signature]
            )
        for name, port in zip(config.outputs, graph.outputs, strict=True):
            port.get_tensor().set_names({name})
        for item, port in zip(signature, graph.inputs, strict=True):
            port.get_tensor().set_names({item.name})
        patch_stateful(model.config, graph)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as exc:
        raise ExportError(f"the model cannot be converted to OpenVINO: {first_line(exc)}") from exc
    return graph


def compress(graph: openvino.Model, recipe: Recipe, group_size: int | None, stage: Stage) -> openvino.Model:
    """Round the weights with NNCF, data-free (round to nearest).

    NNCF has no groups at 8 bits. What takes them gets 4 bits in groups here: the same graph, whose values are replaced.

    Args:
        stage: advanced by the number of weights done.

    Raises:
        ExportError: NNCF cannot.
    """
    import nncf

    modes = nncf.CompressWeightsMode
    backups = {"int8_asym": nncf.BackupMode.INT8_ASYM, "int8_sym": nncf.BackupMode.INT8_SYM, "fp": nncf.BackupMode.NONE}
    scheme = "SYM" if recipe.is_symmetric else "ASYM"
    try:
        with _report_nncf(stage):
            if recipe.weights == "int8" and not recipe.has_groups:
                return nncf.compress_weights(graph, mode=modes[f"INT8_{scheme}"])
            four_bits: dict[str, Any] = {"mode": modes[f"INT4_{scheme}"], "group_size": group_size}
            if recipe.weights == "int8":
                return nncf.compress_weights(graph, all_layers=True, **four_bits)
            four_bits["ratio"] = 1.0 if recipe.is_mixed else recipe.ratio
            four_bits["backup_mode"] = backups[recipe.backup]
            if recipe.output_layer_bits == 8:
                return nncf.compress_weights(graph, **four_bits)
            # NNCF's `all_layers` would take the embedding along: it is left out, and rounded in a second pass.
            embedding = nncf.IgnoredScope(names=_untied_embeddings(graph))
            graph = nncf.compress_weights(graph, all_layers=True, ignored_scope=embedding, **four_bits)
            if recipe.backup == "fp" or not embedding.names:
                return graph
            return nncf.compress_weights(graph, mode=modes[recipe.backup.upper()])
    except (nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError, RuntimeError, ValueError) as exc:
        raise ExportError(f"the weights cannot be rounded: {first_line(exc)}") from exc


def save(graph: openvino.Model, folder: Path, recipe: Recipe) -> None:
    """Write openvino_model.xml and .bin, with the same hints for other loaders as Optimum gives them.

    Raises:
        ResourceError, ExportError: as `write_ir`.
    """
    from optimum.exporters.openvino.convert import _add_version_info_to_model

    _add_version_info_to_model(graph, "transformers")
    # As optimum.exporters.openvino.convert._set_runtime_options; only f16 and u8 KV caches are in question.
    graph.set_rt_info("8.0", ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
    if recipe.weights == "fp16":
        graph.set_rt_info("f16", ["runtime_options", "KV_CACHE_PRECISION"])
    write_ir(graph, folder / IR_NAME)


def write_ir(graph: openvino.Model, path: Path) -> None:
    """Write a graph as .xml and .bin, with its constants as they are.

    Raises:
        ResourceError: the system has no room for it.
        ExportError: OpenVINO cannot write it for another reason.
    """
    import openvino

    try:
        openvino.save_model(graph, path, compress_to_fp16=False)
    except RuntimeError as exc:  # "iostream error" for everything that the system may refuse; its files are removed
        weights = (node for node in graph.get_ordered_ops() if isinstance(node, openvino.op.Constant))
        require_free_disk(path, _XML_BYTES + sum(node.get_byte_size() for node in weights))
        raise ExportError(f"OpenVINO cannot write {path.name}: {first_line(exc)}") from exc


def check_structure(folder: Path, architecture: Architecture) -> None:
    """Inputs, output and KV cache variables of a written IR, as `convert` promises them.

    Raises:
        ExportError: something is missing or has another shape.
        ResourceError: the disk is full.
    """
    import openvino

    try:
        graph = openvino.Core().read_model(folder / IR_NAME)
    except RuntimeError as exc:
        require_free_disk(folder)
        raise ExportError("the written model cannot be opened again: its weights are not whole") from exc
    inputs = {name for port in graph.inputs for name in port.get_names()}
    wanted = {"input_ids", "attention_mask", "beam_idx"}
    missing = wanted.union({"position_ids"} if architecture.positions == "rotary" else ()) - inputs
    if missing:
        raise ExportError(f"the converted model lacks the input {', '.join(sorted(missing))}")
    vocabulary = graph.output("logits").get_partial_shape()[2]
    if vocabulary.is_static and vocabulary.get_length() != architecture.vocabulary:
        raise ExportError(f"the converted model has {vocabulary} logits instead of {architecture.vocabulary}")
    caches = [node.get_output_partial_shape(0) for node in graph.get_ops() if node.get_type_name() == "ReadValue"]
    if len(caches) != 2 * architecture.layers:
        raise ExportError(
            f"the converted model has {len(caches)} KV cache tensors instead of {2 * architecture.layers}"
        )
    heads = (architecture.kv_heads, architecture.head_dim)
    for shape in caches:
        found = tuple(shape[axis].get_length() if shape[axis].is_static else None for axis in (1, 3))
        if found != heads:
            raise ExportError(f"the converted model's KV cache is {shape}, without {heads[0]} heads of {heads[1]}")


@contextmanager
def _traceable_in_16_bits(model: PreTrainedModel) -> Iterator[None]:
    """Trace 16-bit matrices as constants without a float32 copy, and all arithmetic in float32.

    OpenVINO replaces torch.bmm for this, in the whole process, and leaves it so; here it is put back.
    """
    import torch
    from openvino.frontend.pytorch import patch_model

    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        yield
        return
    original = "_forward_before_tracing"
    try:
        # The name has two leading underscores, and is what Optimum calls as well.
        getattr(patch_model, "__make_16bit_traceable")(model, original)
        yield
    finally:
        patch_model.unpatch_model(model, original)


def _positional(patched_forward: Any, forward: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """TorchScript passes positional arguments and cannot return dictionaries: adapt Optimum's patched forward."""
    names = [name for name in inspect.signature(forward).parameters if name in inputs]

    @functools.wraps(patched_forward)
    def traced_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        kwargs.update(zip(names, args, strict=False))
        outputs = patched_forward(**kwargs)
        return tuple(tuple(value) if isinstance(value, list) else value for value in outputs.values())

    return traced_forward


def _untied_embeddings(graph: openvino.Model) -> list[str]:
    """Names of the look-ups (Gather) in weight tables that no matrix product uses as well."""
    names = []
    for node in graph.get_ops():
        if node.get_type_name() == "Gather" and node.input(0).get_partial_shape().rank.get_length() == 2:
            table = node.input_value(0).get_node()
            if table.get_type_name() == "Convert":
                table = table.input_value(0).get_node()
            if table.get_type_name() == "Constant" and not _feeds_product(table):
                names.append(node.get_friendly_name())
    return names


def _feeds_product(node: Any) -> bool:
    consumers = [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]
    return any(
        consumer.get_type_name() == "MatMul" or (consumer.get_type_name() == "Convert" and _feeds_product(consumer))
        for consumer in consumers
    )


@contextmanager
def _report_nncf(stage: Stage) -> Iterator[None]:
    """Redirect NNCF's progress to `stage` instead of a bar on stdout; patched, because NNCF has no option for it."""
    from nncf.quantization.algorithms.weight_compression import algorithm, mixed_precision

    def track(
        sequence: Iterable[Any], *, description: str = "", weights: list[int] | None = None, **options: Any
    ) -> Iterator[Any]:
        if weights is None:  # choosing which layers take the backup; quick
            yield from sequence
            return
        stage.set_total(sum(weights))
        for item, size in zip(sequence, weights, strict=True):
            yield item
            stage.advance(size)

    originals = [(module, module.track) for module in (algorithm, mixed_precision)]
    try:
        for module, _ in originals:
            module.track = track
        yield
    finally:
        for module, original in originals:
            module.track = original


TOKENIZER_NAME = "openvino_tokenizer.xml"
DETOKENIZER_NAME = "openvino_detokenizer.xml"


def save_tokenizer_ir(tokenizer: Any, folder: Path, template: str | None) -> None:
    """Write tokenizer and detokenizer, with the chat template where openvino_genai looks for it.

    Padding and truncation go to the left, as Optimum sets them for text generation.

    Args:
        template: jinja2 source, or None for a base model.

    Raises:
        ExportError: openvino_tokenizers does not support this tokenizer.
        ResourceError: the disk is full.
    """
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino.utils import set_simplified_chat_template

    tokenizer.padding_side = tokenizer.truncation_side = "left"
    try:
        encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as exc:  # it raises many kinds, its own and bare ones
        raise ExportError(f"the tokenizer cannot be converted to OpenVINO: {exc}".splitlines()[0]) from exc
    if template is not None:
        encoder.set_rt_info(template, "chat_template")
        set_simplified_chat_template(encoder)
    write_ir(encoder, folder / TOKENIZER_NAME)
    write_ir(decoder, folder / DETOKENIZER_NAME)


def tokenizer_ir_differs(tokenizer: Any, folder: Path, text: str) -> bool:
    """Whether the OpenVINO tokenizer gives other ids for `text` than the checkpoint's own."""
    import openvino
    import openvino_tokenizers  # noqa: F401  (its import registers the operations)

    encode = openvino.Core().compile_model(folder / TOKENIZER_NAME, "CPU")
    ids: list[int] = encode([text])["input_ids"][0].tolist()
    return ids != list(tokenizer(text)["input_ids"])
