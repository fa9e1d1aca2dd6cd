"""The configuration of the model that an artifact is measured by, made from config.json as it was given.

This shares no code with the reader of config.json (config.py, families/): what that one drops or misreads shows as a
difference. transformers' own classes fill in what is missing; here only the spellings of transformers 5 become those of
transformers 4, which ignores what it does not know. Fields that name code or choose the form of an answer are left out:
known_fields.py has let nothing through that is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
