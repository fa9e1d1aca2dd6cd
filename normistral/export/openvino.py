"""Conversion to OpenVINO IR: transformers model → traced, stateful graph → rounded weights → files.

The export configuration, the patches that make a model traceable and the stateful KV cache are Optimum's. Its
`export_from_model` is not used: it writes the whole checkpoint out as a bf16 IR and reads that back before NNCF rounds
it. Here NNCF rounds the traced graph itself, whose constants are the memory-mapped safetensors: no temporary copy of
the weights, neither on disk nor in memory.

It does not know where checkpoints come from or what else an artifact holds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normistral.errors import ExportError, MissingExtraError, first_line
from normistral.export.progress import Stage
from normistral.export.recipe import Recipe
from normistral.export.staging import require_free_disk

if TYPE_CHECKING:
    import openvino
    import torch
    from transformers import PreTrainedModel

IR_NAME = "openvino_model.xml"
_TASK = "text-generation-with-past"
_LARGEST_FLOAT16 = 65504.0


_TOOLS = ("torch", "transformers", "nncf", "openvino_tokenizers", "optimum.exporters.openvino.convert")


def find_export_tools() -> None:
    """See that everything an export needs is installed, before any work and without the seconds that importing takes.

    Raises:
        MissingExtraError: the extra `export` is not installed.
    """
    for tool in _TOOLS:
        package = tool.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise _missing(package)


def require_export_tools() -> None:
    """Import everything an export needs.

    Raises:
        MissingExtraError: the extra `export` is installed only in part.
    """
    try:
        for tool in _TOOLS:
            importlib.import_module(tool)
    except ImportError as exc:
        raise _missing(exc.name or "optimum") from exc


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"exporting needs the package {package}, which is not installed",
        'install it with: pip install "normistral[export]"',
    )


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The checkpoint as a transformers model; safetensors stay memory-mapped when `dtype` is their own.

    Runs no code of the checkpoint and asks no network.

    Args:
        folder: config.json and weights, as `open_checkpoint` prepared them.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ExportError: transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as exc:
        raise ExportError(f"transformers cannot load the checkpoint: {first_line(exc)}") from exc
    return model.eval()


def round_to_float16(model: PreTrainedModel, file: Path) -> None:
    """Replace the matrices of `model` by their float16 rounding, kept in a memory-mapped `file`.

    Takes 2 bytes of disk per weight and next to no memory. Vectors (norms) stay as they are.

    Raises:
        ExportError: a weight lies outside float16's range.
    """
    import torch

    matrices = {name: tensor for name, tensor in model.named_parameters() if tensor.ndim >= 2}
    total = sum(tensor.numel() for tensor in matrices.values())
    rounded = torch.from_file(str(file), shared=True, size=total, dtype=torch.float16)
    start = 0
    with torch.no_grad():
        for name, parameter in matrices.items():
            low, high = torch.aminmax(parameter)
            if not max(-low.item(), high.item()) <= _LARGEST_FLOAT16:
                raise ExportError(
                    f"{name} has values up to {max(-low.item(), high.item()):g}, beyond float16's {_LARGEST_FLOAT16:g}",
                    "use int8 or int4 weights",
                )
            view = rounded[start : start + parameter.numel()].view(parameter.shape)
            parameter.data = view.copy_(parameter)
            start += parameter.numel()


def convert(model: PreTrainedModel) -> openvino.Model:
    """Trace a decoder into a stateful OpenVINO graph.

    Inputs are input_ids, attention_mask, position_ids [batch, tokens] and beam_idx [batch], the output is logits
    float32 [batch, tokens, vocabulary]; keys and values live in variables float32 [batch, KV heads, past, head_dim].
    The graph's large constants are the model's own memory: keep `model` until the graph is saved.

    Follows `optimum.exporters.openvino.convert.export_pytorch` (optimum-intel 1.27), without its save.

    Raises:
        ExportError: Optimum or OpenVINO cannot convert it.
    """
    import openvino
    import torch
    from openvino.frontend.pytorch import patch_model
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    from optimum.exporters.openvino.stateful import patch_stateful
    from optimum.exporters.openvino.utils import _get_input_info

    model.config.return_dict = True
    try:
        config = _export_config(model)
        inputs = config.rename_ambiguous_inputs(config.generate_dummy_inputs(framework="pt"))
        patcher = config.patch_model_for_export(model)
        patcher.patched_forward = _positional(patcher.patched_forward, patcher.orig_forward, inputs)
        with torch.no_grad(), patcher:
            if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
                # 16-bit matrices become constants as they are, without a float32 copy, and all arithmetic float32.
                # The name has two leading underscores, and is what Optimum calls as well.
                getattr(patch_model, "__make_16bit_traceable")(model)
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


def compress(graph: openvino.Model, recipe: Recipe, group_size: int, stage: Stage) -> openvino.Model:
    """Round the weights with NNCF, data-free (round to nearest).

    Args:
        stage: advanced by the number of weights done.

    Raises:
        ExportError: NNCF cannot.
    """
    import nncf

    modes = nncf.CompressWeightsMode
    backups = {"int8_asym": nncf.BackupMode.INT8_ASYM, "int8_sym": nncf.BackupMode.INT8_SYM, "fp": nncf.BackupMode.NONE}
    grid = "SYM" if recipe.symmetric else "ASYM"
    try:
        with _report_nncf(stage):
            if recipe.weights == "int8":
                return nncf.compress_weights(graph, mode=modes[f"INT8_{grid}"])
            four_bits: dict[str, Any] = {"mode": modes[f"INT4_{grid}"], "group_size": group_size, "ratio": recipe.ratio}
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
        ResourceError: the disk is full.
        ExportError: OpenVINO cannot write it for another reason.
    """
    import openvino

    try:
        openvino.save_model(graph, path, compress_to_fp16=False)
    except RuntimeError as exc:  # it says "iostream error" for everything that the system may refuse
        require_free_disk(path)
        raise ExportError(f"OpenVINO cannot write {path.name}: {first_line(exc)}") from exc


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Keep the tools' own bars, tables and warnings off stdout and stderr; ours say what matters."""
    import nncf
    from nncf.common.logging.logger import nncf_logger
    from transformers.utils import logging as transformers_logging

    with ExitStack() as restore:
        restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        restore.callback(nncf.set_log_level, nncf_logger.level)
        nncf.set_log_level(logging.ERROR)
        restore.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        if transformers_logging.is_progress_bar_enabled():
            restore.callback(transformers_logging.enable_progress_bar)
        transformers_logging.disable_progress_bar()
        yield


def _export_config(model: PreTrainedModel) -> Any:
    """Optimum's export configuration for a decoder with past keys and values among its inputs."""
    import optimum.exporters.openvino.model_configs  # noqa: F401  (registers them)
    from optimum.exporters.tasks import TasksManager

    constructor = TasksManager.get_exporter_config_constructor(
        model=model, exporter="openvino", task=_TASK, library_name="transformers"
    )
    kind = constructor.func  # a partial that knows only the task
    return kind(model.config, task="text-generation", use_past=True, use_past_in_inputs=True)


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
    """Let NNCF's progress go to `stage` instead of a bar on stdout. It offers no other way than its own names."""
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
