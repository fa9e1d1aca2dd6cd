"""The architectures that can be exported: how to find a checkpoint's, and its config.json from known, checked fields.

Whitelist, not blacklist: whatever is not listed in a family's table (`auto_map`, `_attn_implementation_internal`,
anything that a later version of transformers might act on) never reaches the libraries that load the model. And nothing
is dropped in silence: config_fields.py says of every field whether it is used or without effect, and what it does not
know is refused.
"""

from __future__ import annotations

from typing import Any

from normistral.errors import CheckpointError, UnsupportedArchitectureError
from normistral.export.checkpoint.config_fields import known_fields
from normistral.export.checkpoint.families.base import Config, Family
from normistral.export.checkpoint.families.bloom import BLOOM
from normistral.export.checkpoint.families.llama import LLAMA, MISTRAL
from normistral.export.checkpoint.fields import (
    AS_PUBLISHED,
    check_fields,
    read_integer,
    read_number,
    read_token_id,
    read_token_ids,
    shorten,
)

_MAX_PARAMETERS = 2**40
_MAX_VOCABULARY = 2**22
_SHARDED = "FSDP"  # torch's fully_shard puts it before the class's name, and older versions of transformers write that

FAMILIES: tuple[Family, ...] = (MISTRAL, LLAMA, BLOOM)


def find_family(config: Config) -> Family:
    """The family of a config.json, from `architectures` first: NORA.LLM's configs name the class there.

    Raises:
        UnsupportedArchitectureError: none of these; it is named, and those that are supported are listed.
        CheckpointError: `architectures` and `model_type` contradict each other.
    """
    supported = f"supported are: {', '.join(family.causal_class for family in FAMILIES)}"
    names = config.get("architectures")
    if names is None:
        by_type = next((family for family in FAMILIES if family.model_type == config.get("model_type")), None)
        if by_type is not None:
            return by_type
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise UnsupportedArchitectureError(
            f"config.json names no single architecture: architectures is {shorten(names)}", supported
        )
    for family in FAMILIES:
        if names[0].removeprefix(_SHARDED) in (family.causal_class, family.headless_class):
            if config.get("model_type", family.model_type) != family.model_type:
                raise CheckpointError(
                    f"config.json contradicts itself: architecture {names[0]}, "
                    f"model_type {shorten(config['model_type'])}",
                    AS_PUBLISHED,
                )
            return family
    raise UnsupportedArchitectureError(f"the architecture {shorten(names[0])} is not supported", supported)


def sanitise_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that matter, checked, with defaults filled in.

    Raises:
        UnsupportedArchitectureError: not a model this package exports.
        CheckpointError: a field is missing, unknown, of the wrong type, out of range, or contradicts another.
    """
    family = find_family(config)
    check_fields(config, known_fields(family.fields, config), "config.json")
    vocabulary = read_integer(config, "vocab_size", 1, _MAX_VOCABULARY)
    clean: dict[str, Any] = {"architectures": [family.causal_class], "model_type": family.model_type}
    clean |= {"vocab_size": vocabulary} | family.read_fields(config)
    clean["initializer_range"] = read_number(config, "initializer_range", 0.0, 10.0, 0.02)
    clean["use_cache"] = True
    clean["bos_token_id"] = read_token_id(config, "bos_token_id", vocabulary)
    clean["pad_token_id"] = read_token_id(config, "pad_token_id", vocabulary)
    clean["eos_token_id"] = read_token_ids(config, "eos_token_id", vocabulary, "config.json") or None
    parameters = family.count_parameters(clean)
    if parameters > _MAX_PARAMETERS:
        raise CheckpointError(f"config.json describes {parameters:.3g} parameters", AS_PUBLISHED)
    return clean
