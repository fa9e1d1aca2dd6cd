"""The checkpoint in transformers, in float32: the reference for everything that is made from it.

Its configuration is made from config.json as it was given, and shares no code with the reader of the export
(checkpoint/families/): a field that one of them drops or misreads shows as a difference. transformers' own
classes fill in what is missing; only the spellings of transformers 5 are translated to those of transformers 4, which
ignores unknown names. Fields that name code or choose the form of an output are left out; unknown fields have been
refused by checkpoint/fields.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normistral.artifact.manifest import Architecture
from normistral.errors import ExportError, first_line
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import map_tensor, shown
from normistral.hardware import available_memory_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Logits = NDArray[np.float32]  # [tokens, vocabulary]

PROBE_TEXT = (
    "Hovedstaden i Norge er Oslo, og den lengste elva er Glåma. På Vestlandet regner det ofte, men folk går tur. "
    "The capital of Norway is Oslo. A short text in two languages is enough to see whether a model was converted whole."
)
PROBE_TOKENS = 64
# A model whose float32 copy takes more than this is not run: twice that is held during the comparison.
_RUN_LIMIT_BYTES = 2 * 10**9


def fits_for_running(architecture: Architecture) -> bool:
    """Whether model and artifact can be run here beside each other."""
    float32_bytes = 4 * architecture.parameters
    return float32_bytes <= _RUN_LIMIT_BYTES and 2 * float32_bytes <= available_memory_bytes()


def load_reference(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model in float32 from config.json as it was given; shares no reader with the exporter.

    Raises:
        ExportError: as `load_model`.
    """
    return load_model(checkpoint, "float32", read_reference_config(checkpoint))


def read_reference_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The reference's configuration; raises ExportError where transformers does not take it."""
    try:
        return reference_config(checkpoint.raw_config, has_output=checkpoint.has_output_layer)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ExportError(f"transformers cannot load the checkpoint: {first_line(exc)}") from exc


def load_model(
    checkpoint: Checkpoint, dtype: str | None = None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The checkpoint as a transformers model whose parameters are the mapped file when `dtype` is their own.

    Nothing is read before it is used, and a page that was read can be dropped again: the model takes address space and
    no memory. (transformers' own loader does so for safetensors, but runs torch's unpickler on a .bin file.)
    Runs no code of the checkpoint and asks no network.

    Args:
        dtype: "float32", "float16" or "bfloat16"; None leaves every tensor in the type that it is stored in.
        config: describes the model; None takes the checkpoint's sanitised config.json.

    Raises:
        ExportError: transformers cannot build the model, or it does not have the checkpoint's tensors.
    """
    import torch
    from transformers import AutoConfig

    family = checkpoint.family
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if not family.is_computed(name)}
    try:
        if config is None:
            config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        model = build_empty(config, getattr(torch, dtype or checkpoint.dtype))
        values = {name: map_tensor(tensor).to(getattr(torch, dtype or tensor.dtype)) for name, tensor in stored.items()}
        unknown = model.load_state_dict(values, strict=False, assign=True).unexpected_keys
        model.tie_weights()  # also where the weights hold a copy for the output layer
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as exc:
        raise ExportError(f"transformers cannot load the checkpoint: {first_line(exc)}") from exc
    absent = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if absent or unknown:
        raise ExportError(
            f"transformers' {type(model).__name__} and the weights differ: "
            f"{len(absent)} tensors are missing, {len(unknown)} left over; first {shown([*absent, *unknown][0])}",
            "config.json and weights belong to different models",
        )
    return model.eval()


def build_empty(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a configuration, its parameters without values; buffers are computed as always."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    # Random values would be drawn for parameters that cannot hold them: a tenth of the time of a tiny model's export.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()  # as transformers does when it has drawn them
    return model


_NOT_THE_MODEL = {
    *("architectures", "model_type", "auto_map", "attn_implementation", "experts_implementation", "custom_pipelines"),
    *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_cache", "dtype", "torch_dtype"),
    *("id2label", "label2id", "num_labels", "problem_type", "quantization_config", "transformers_version"),
}


def reference_config(raw: dict[str, Any], *, has_output: bool) -> PretrainedConfig:
    """config.json as transformers means it.

    Args:
        raw: the file's fields.
        has_output: whether the weights hold an output layer that differs from the embedding; it wins over tying.

    Raises:
        ValueError, TypeError, KeyError: transformers does not take it.
    """
    from transformers import AutoConfig

    fields = {name: value for name, value in raw.items() if name not in _NOT_THE_MODEL and not name.startswith("_")}
    parameters = fields.pop("rope_parameters", None)
    if parameters:
        if "rope_theta" in parameters:
            fields["rope_theta"] = parameters["rope_theta"]
        if not fields.get("rope_scaling"):
            fields["rope_scaling"] = {name: value for name, value in parameters.items() if name != "rope_theta"}
    scaling = fields.get("rope_scaling")
    if scaling:
        fields["rope_theta"] = scaling.get("rope_theta") or fields.get("rope_theta") or 10000.0
        if (scaling.get("rope_type") or scaling.get("type")) is None:
            scaling = None
    # Null means "not given" here; transformers 4 would take it as the value.
    optional = ("rope_theta", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "initializer_range")
    fields = {name: value for name, value in fields.items() if value is not None or name not in optional}
    fields["rope_scaling"] = scaling or None
    config = AutoConfig.for_model(_model_type(raw), **fields)
    if getattr(config, "head_dim", 0) is None:  # transformers 4's Mistral leaves it so, and its YaRN cannot bear it
        config.head_dim = config.hidden_size // config.num_attention_heads
    if has_output:
        config.tie_word_embeddings = False
    return config


def _model_type(raw: dict[str, Any]) -> str:
    """transformers' name of the architecture; the class counts where both stand."""
    for name in raw.get("architectures") or ():
        for model_type in ("mistral", "llama", "bloom"):
            if name.lower().startswith(model_type):
                return model_type
    return str(raw["model_type"])
