"""The architectures that can be exported, and how to find a checkpoint's."""

from __future__ import annotations

from normistral.errors import CheckpointError, UnsupportedArchitectureError
from normistral.export.checkpoint.families.base import Config, Family
from normistral.export.checkpoint.families.bloom import BLOOM
from normistral.export.checkpoint.families.llama import LLAMA, MISTRAL
from normistral.export.checkpoint.fields import AS_PUBLISHED, shorten

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
        if names[0] in (family.causal_class, family.headless_class):
            if config.get("model_type", family.model_type) != family.model_type:
                raise CheckpointError(
                    f"config.json contradicts itself: architecture {names[0]}, "
                    f"model_type {shorten(config['model_type'])}",
                    AS_PUBLISHED,
                )
            return family
    raise UnsupportedArchitectureError(f"the architecture {shorten(names[0])} is not supported", supported)
