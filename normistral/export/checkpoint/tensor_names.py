"""Who wrote a weight file, from the names of tensors that a language model's config.json does not describe."""

from __future__ import annotations

import re
from collections.abc import Iterable

from normistral.export.checkpoint.file_kinds import ForeignFile

_ORIGINAL = "export the original checkpoint, from which it was made"
# Endings of tensors' names that tell who wrote them.
_TENSORS = {
    r"\.(?:qweight|qzeros|g_idx)$": "quantised by GPTQ or AWQ",
    r"\.(?:absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.": "quantised by bitsandbytes",
    r"\.weight_(?:packed|scale|scale_inv|zero_point|shape)$|\.input_scale$": "quantised (compressed-tensors or fp8)",
    r"\.W_q$": "quantised by HQQ",
    r"\.lora_[AB]\b": "a LoRA adapter, not a whole model",
    r"\.base_layer\.": "a model with a LoRA adapter that was not merged",
    r"\.scales$": "quantised by MLX",
}
_PREFIXES = {"_orig_mod.": "torch.compile", "module.": "torch's DataParallel"}


def recognise_tensors(names: Iterable[str]) -> ForeignFile | None:
    """What weights are whose tensors a config.json does not describe."""
    names = list(names)
    for pattern, what in _TENSORS.items():
        if any(re.search(pattern, name) for name in names):
            hint = "merge it into its base model first" if "LoRA" in what else _ORIGINAL
            return ForeignFile(what, hint)
    for prefix, writer in _PREFIXES.items():
        if names and all(name.startswith(prefix) for name in names):
            return ForeignFile(
                f"saved from inside {writer}: every name begins with {prefix}",
                f"take {prefix} off the names, or save the model itself",
            )
    return None
