"""A family of architectures: config fields, tensor names and shapes; one value of `Family` each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from normistral.artifact.manifest import Architecture
from normistral.export.checkpoint.fields import KnownField

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]  # tensor name -> shape as stored; [out, in] for a matrix

OUTPUT_LAYER = "lm_head.weight"  # in every family; absent where it is tied to the embedding


@dataclass(frozen=True, slots=True)
class Family:
    """Architectures that share their config's fields and their tensors' names.

    Attributes:
        model_type: transformers' name of it.
        causal_class: the class with an output layer; the one that is exported.
        headless_class: the class without; some checkpoints name it although they hold an output layer.
        prefix: what the names of a checkpoint of `causal_class` begin with, output layer excepted.
        embedding: name of the token embedding.
        context_field: field of config.json that gives the context.
        fields: everything that may stand in config.json.
        read_fields: checks config.json's fields beyond those that all families have (`sanitise_config`).
        describe: the shape, from sanitised fields and the number of parameters.
        outer_tensors: shapes of what is there once, without the output layer.
        layer_tensors: shapes of what every layer has.
        layer_prefix: what stands before the names of `layer_tensors`, but for the layer's number.
        computed: names of tensors that old checkpoints carry and that are computed, not learnt.
    """

    model_type: str
    causal_class: str
    headless_class: str
    prefix: str
    embedding: str
    context_field: str
    fields: Mapping[str, KnownField]
    read_fields: Callable[[Config], Config]
    describe: Callable[[Config, int], Architecture]
    outer_tensors: Callable[[Config], Shapes]
    layer_tensors: Callable[[Config], Shapes]
    layer_prefix: str
    computed: re.Pattern[str] | None = None

    def tensor_shapes(self, config: Config) -> Shapes:
        """Shapes of all weights of a model, by the names that transformers gives them; from sanitised fields."""
        tensors, layer_tensors = self.outer_tensors(config), self.layer_tensors(config)
        for layer in range(self.describe(config, 1).layers):
            tensors |= {f"{self.layer_prefix}{layer}.{name}": shape for name, shape in layer_tensors.items()}
        if not config["tie_word_embeddings"]:
            tensors[OUTPUT_LAYER] = tensors[self.embedding]
        return tensors

    def count_parameters(self, config: Config) -> int:
        """Parameters of a model from sanitised fields; a tied output layer counts once."""
        outer = self.outer_tensors(config)
        layer = sum(math.prod(shape) for shape in self.layer_tensors(config).values())
        output = 0 if config["tie_word_embeddings"] else math.prod(outer[self.embedding])
        layers = self.describe(config, 1).layers
        return int(layers * layer + sum(math.prod(shape) for shape in outer.values()) + output)

    def architecture(self, config: Config) -> Architecture:
        """Shape and size of a model, from sanitised fields."""
        return self.describe(config, self.count_parameters(config))

    def context_length(self, config: Config) -> int | None:
        """The context that sanitised fields give, in tokens; None where they give none (ALiBi needs none)."""
        return config.get(self.context_field)

    def is_computed(self, name: str) -> bool:
        """Whether a tensor of this name is one of `computed`."""
        return self.computed is not None and self.computed.search(name) is not None
