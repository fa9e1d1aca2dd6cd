"""The recipe of an export: options for storing weights, their defaults, resulting sizes in bytes.

It does not know the tool that quantizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from normistral.artifact.manifest import Architecture, ArtifactFormat, GraphKind, RecipeRecord
from normistral.artifact.presets import WeightFormat
from normistral.errors import UsageError

GROUP_SIZES = (128, 64, 32, 16)
"""Weights per scale, best first: larger groups decode faster and take fewer bytes."""

PER_CHANNEL = -1
MIN_CONTEXT = 16  # tokens
FUSED_CONTEXT = 32768  # tokens; the fused graph holds a table of every position's rotary angles: 512 bytes each
UNSTATED_CONTEXT = 2048  # tokens; where no file gives a context, as NorBLOOM's: the sequence length of the first BLOOM

FallbackDtype = Literal["int8_asym", "int8_sym", "fp"]
RecipeName = Literal["fast", "balanced", "best"]

_WEIGHTS: dict[ArtifactFormat, tuple[WeightFormat, ...]] = {
    "openvino": ("int4", "int8", "fp16"),
    "onnx": ("int4", "int8", "fp16", "fp32"),
}
# The options that each weight format heeds; `context_length` is for all.
_MEANINGFUL: dict[tuple[ArtifactFormat, WeightFormat], set[str]] = {
    ("openvino", "int4"): {"recipe", "group_size", "symmetric", "ratio", "backup", "output_layer_bits"},
    ("openvino", "int8"): {"recipe", "group_size", "symmetric"},
    ("openvino", "fp16"): set(),
    ("onnx", "int4"): {"recipe", "group_size", "symmetric", "ratio", "backup", "output_layer_bits", "graph"},
    ("onnx", "int8"): {"recipe", "group_size", "symmetric", "graph"},
    ("onnx", "fp16"): {"graph"},
    ("onnx", "fp32"): {"graph"},
}
_NAMES: dict[ArtifactFormat, str] = {"openvino": "OpenVINO", "onnx": "ONNX"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Options of the user; the only place of their defaults.

    Attributes:
        weights: "int4", "int8", "fp16", or in ONNX "fp32".
        recipe: how int4 and int8 are rounded inside the layers. "fast" rounds to nearest. "balanced" runs our texts
            through the model and searches scales that lose least on them. "best" does so too, and lets GPTQ with
            GPTAQ's correction choose every value. None takes "best" for int4, where it more than halves what is lost,
            and "fast" for int8.
        group_size: weights that share one scale (128, 64, 32 or 16); for OpenVINO also -1, one scale per output
            channel. None takes the largest that divides the widths of this model, and -1 for int8 in OpenVINO.
        symmetric: rounding to a grid around zero, without zero points; for int4 and int8. None takes it but for "best"
            at int4. On CPUs OpenVINO decodes symmetric int4 a third faster than asymmetric int4; rounded to nearest
            they are equally good, with GPTQ zero points take a tenth off what is lost.
        ratio: share of the inner layers' weights in int4, above 0 and up to 1. With "fast" the most sensitive layers
            (by their rounding error) take `backup` instead; in ONNX it is 1. With "balanced" and "best" the matrices
            whose rounding changes the model's answers most take 8 bits, without zero points, in the same groups.
        backup: precision of the layers that are not int4 (embedding, output layer, what `ratio` leaves with "fast"):
            "int8_asym", "int8_sym", or "fp" to leave them as they are in the checkpoint (in ONNX: float32).
        output_layer_bits: 8 stores the output layer in `backup`, 4 in int4. An embedding that is tied to it goes along.
        graph: of ONNX: "fused" has onnxruntime's own operators, "plain" those of the standard and no rounded weights.
            None takes fused for int4 and int8, plain for fp16 and fp32.
        context_length: the most tokens that prompt and answer may take together. None takes the checkpoint's, in a
            fused graph at most 32,768.
        format: "openvino" or "onnx".
    """

    weights: WeightFormat = "int4"
    recipe: RecipeName | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    ratio: float = 1.0
    backup: FallbackDtype = "int8_asym"
    output_layer_bits: int = 8
    graph: GraphKind | None = None
    context_length: int | None = None
    format: ArtifactFormat = "openvino"

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range, or for one that this format would ignore."""
        _require_one_of("format", self.format, tuple(_WEIGHTS))
        _require_one_of("weights", self.weights, _WEIGHTS["onnx"])
        _require_one_of("recipe", self.recipe_name, ("fast", "balanced", "best"))
        _require_one_of("group_size", self.group_size, (None, *GROUP_SIZES, PER_CHANNEL))
        _require_one_of("symmetric", self.symmetric, (None, True, False))
        _require_one_of("backup", self.backup, ("int8_asym", "int8_sym", "fp"))
        _require_one_of("output_layer_bits", self.output_layer_bits, (4, 8))
        _require_one_of("graph", self.graph, (None, "fused", "plain"))
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0.0 < self.ratio <= 1.0:
            raise UsageError(f"ratio must be a number above 0 and up to 1, not {self.ratio!r}", "1 is every layer")
        if self.context_length is not None and (
            not isinstance(self.context_length, int)
            or isinstance(self.context_length, bool)
            or self.context_length < MIN_CONTEXT
        ):
            raise UsageError(
                f"the context must be a whole number of at least {MIN_CONTEXT} tokens, not {self.context_length!r}",
                "leave it out for the checkpoint's own",
            )
        self._require_possible()

    def _require_possible(self) -> None:
        """Raises UsageError for options that are each fine and not so together."""
        if self.weights not in _WEIGHTS[self.format]:
            raise UsageError(
                f"{_NAMES[self.format]} artifacts have no {self.weights} weights", "use --format onnx, or fp16 weights"
            )
        for field in fields(self):
            if (
                field.name in set().union(*_MEANINGFUL.values())
                and getattr(self, field.name) != field.default
                and field.name not in _MEANINGFUL[self.format, self.weights]
            ):
                users = [
                    f"{weights} in {_NAMES[format]}"
                    for (format, weights), names in _MEANINGFUL.items()
                    if field.name in names
                ]
                raise UsageError(
                    f"{field.name} means nothing for {self.weights} weights in {_NAMES[self.format]}",
                    f"leave it out; it is for {', '.join(users)}",
                )
        if self.format == "onnx" and self.group_size == PER_CHANNEL:
            raise UsageError(
                "ONNX's rounded matrices have groups; one scale per channel (-1) is not possible",
                f"use a group size of {', '.join(map(str, GROUP_SIZES))}, or --format openvino",
            )
        if self.graph == "plain" and self.weights in ("int4", "int8"):
            raise UsageError(
                f"a plain graph has no {self.weights} weights: onnxruntime's operators for them make it a fused one",
                "use --graph fused, or fp16 or fp32 weights",
            )
        if self.ratio != 1.0 and self.recipe_name == "fast" and self.format == "onnx":
            raise UsageError(
                f"the recipe fast rounds all layers alike in ONNX, so a ratio of {self.ratio:g} is not possible",
                "leave the ratio out, or use the recipe balanced or best",
            )
        if self.output_layer_bits == 8 and self.backup == "fp":
            raise UsageError(
                "an output layer of 8 bits needs an 8-bit backup, not fp",
                "use backup int8_asym, or 4 output layer bits",
            )

    @property
    def graph_kind(self) -> GraphKind | None:
        """The graph to write; None in OpenVINO."""
        if self.format != "onnx":
            return None
        return self.graph or ("fused" if self.weights in ("int4", "int8") else "plain")

    @property
    def recipe_name(self) -> RecipeName:
        """`recipe`, or what None takes."""
        return self.recipe or ("best" if self.weights == "int4" else "fast")

    @property
    def is_symmetric(self) -> bool:
        """`symmetric`, or what None takes."""
        return not (self.recipe_name == "best" and self.weights == "int4") if self.symmetric is None else self.symmetric

    @property
    def has_groups(self) -> bool:
        """Whether these weights have groups; int8 in OpenVINO only has those that are asked for."""
        if (self.format, self.weights) == ("openvino", "int8"):
            return self.group_size not in (None, PER_CHANNEL)
        return "group_size" in _MEANINGFUL[self.format, self.weights]

    @property
    def is_mixed(self) -> bool:
        """Whether a calibration chooses which matrices take 8 bits."""
        return self.ratio != 1.0 and self.recipe_name != "fast"


def choose_recipe(format: str, weights: str, options: dict[str, Any]) -> Recipe:
    """Check the user's options.

    Raises:
        UsageError: an unknown option or an impossible value.
    """
    known = [field.name for field in fields(Recipe) if field.name not in ("format", "weights")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}", f"recipe options are: {', '.join(known)}")
    return Recipe(format=format, weights=weights, **options)  # type: ignore[arg-type]


def input_widths(architecture: Architecture) -> tuple[int, ...]:
    """Input features of the layers that are rounded: groups are cut along them."""
    attention = architecture.heads * architecture.head_dim
    return tuple(sorted({architecture.hidden_size, attention, architecture.feed_forward}))


def choose_group_size(architecture: Architecture, recipe: Recipe) -> int | None:
    """The group size to use: the one asked for if it fits, else the largest allowed one that divides every width.

    Returns:
        weights per scale; -1 (one scale per output channel) when none divides them; None for weights without groups.

    Raises:
        UsageError: the one asked for does not divide the widths, or none does and ONNX is asked for.
    """
    if not recipe.has_groups:
        return None
    widths = input_widths(architecture)
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    possible = fitting if recipe.format == "onnx" else [*fitting, PER_CHANNEL]
    if recipe.group_size in possible:
        return recipe.group_size
    wanted = "no group size divides" if recipe.group_size is None else f"group size {recipe.group_size} does not divide"
    if recipe.group_size is None and possible:
        return possible[0]
    raise UsageError(
        f"{wanted} all of the model's widths {', '.join(map(str, widths))}",
        f"for this model choose one of: {', '.join(map(str, possible))}"
        if possible
        else "use fp16 weights, or --format openvino",
    )


def choose_context(architecture: Architecture, trained: int | None, recipe: Recipe) -> int:
    """The context of the artifact in tokens.

    Args:
        trained: the checkpoint's; None where it gives none, and any may be asked for.

    Raises:
        UsageError: more is asked for than the checkpoint has.
    """
    if recipe.context_length is None:
        if trained is None:
            return UNSTATED_CONTEXT
        has_table = recipe.graph_kind == "fused" and architecture.positions == "rotary"
        return min(trained, FUSED_CONTEXT) if has_table else trained
    if trained is not None and recipe.context_length > trained:
        raise UsageError(
            f"the context of {recipe.context_length} tokens is beyond the checkpoint's {trained}",
            f"use at most {trained}",
        )
    return recipe.context_length


def describe_choices(
    architecture: Architecture, trained: int | None, recipe: Recipe, group_size: int | None, context: int
) -> Iterator[str]:
    """Notes for the user before the work: the recipe in words, and choices that depend on the model.

    Args:
        trained: the checkpoint's context in tokens; None where it gives none.
    """
    yield f"weights: {describe_recipe(recipe, group_size)}"
    if recipe.has_groups and recipe.group_size is None and group_size != GROUP_SIZES[0]:
        widths = ", ".join(map(str, input_widths(architecture)))
        yield f"group size {GROUP_SIZES[0]} does not divide all of the model's widths {widths}"
    if trained is None:
        chosen = "are taken; --context N sets another" if recipe.context_length is None else "are asked for"
        yield f"context: the checkpoint gives none, and ALiBi has no limit of its own: {context} tokens {chosen}"
    elif recipe.context_length is None and context < trained:
        yield f"context: {context} of the checkpoint's {trained} tokens, the default's limit; --context N sets another"


def describe_recipe(recipe: Recipe, group_size: int | None) -> str:
    """The recipe in a few words: "int4 symmetric, group 64, output layer int8_asym"."""
    graph = "" if recipe.graph_kind is None else f", {recipe.graph_kind} graph"
    if recipe.weights in ("fp16", "fp32"):
        return recipe.weights + graph
    grid = "symmetric" if recipe.is_symmetric else "asymmetric"
    groups = "per channel" if group_size in (None, PER_CHANNEL) else f"group {group_size}"
    named = "" if recipe.recipe_name == "fast" else f", recipe {recipe.recipe_name}"
    if recipe.weights == "int8":
        return f"int8 {grid}, {groups}{named}{graph}"
    mixed = "" if recipe.ratio == 1.0 else f", {recipe.ratio:.0%} of the layers"
    if recipe.is_mixed:
        mixed = f", {1 - recipe.ratio:.0%} of the weights in int8"
    output = recipe.backup if recipe.output_layer_bits == 8 else "int4"
    return f"int4 {grid}, {groups}{mixed}, output layer {output}{named}{graph}"


def record_recipe(recipe: Recipe, group_size: int | None) -> RecipeRecord:
    """The recipe as the manifest keeps it; what means nothing for this weight format stays None."""
    meant = _MEANINGFUL[recipe.format, recipe.weights]
    return RecipeRecord(
        recipe.weights,
        symmetric=recipe.is_symmetric if "symmetric" in meant else None,
        group_size=group_size,
        ratio=float(recipe.ratio) if recipe.weights == "int4" else None,
        backup=recipe.backup if "backup" in meant else None,
        output_layer_bits=recipe.output_layer_bits if "output_layer_bits" in meant else None,
        graph=recipe.graph_kind,
        recipe=recipe.recipe_name if "recipe" in meant else None,
    )


def estimate_weight_bytes(architecture: Architecture, recipe: Recipe, group_size: int | None) -> int:
    """Size of the stored weights in bytes, scales and zero points included."""
    if recipe.weights in ("fp16", "fp32"):
        return (2 if recipe.weights == "fp16" else 4) * architecture.parameters
    narrowest = min(input_widths(architecture))
    width = narrowest if not recipe.has_groups or group_size in (None, PER_CHANNEL) else group_size
    assert width is not None
    if recipe.weights == "int8":
        return int(_bytes_per_weight(recipe, 8, recipe.is_symmetric, width) * architecture.parameters)
    eight_bits_width = width if recipe.format == "onnx" else narrowest  # OpenVINO's backup is per channel
    if recipe.backup == "fp":
        backup = 4.0 if recipe.format == "onnx" else 2.0
    else:
        backup = _bytes_per_weight(recipe, 8, recipe.backup == "int8_sym", eight_bits_width)
    table = architecture.vocabulary * architecture.hidden_size
    inner = inner_weights(architecture)
    in_four_bits = recipe.ratio * inner + (table if recipe.output_layer_bits == 4 else 0)
    four_bits = _bytes_per_weight(recipe, 4, recipe.is_symmetric, width)
    in_int8 = _bytes_per_weight(recipe, 8, True, width) if recipe.is_mixed else backup
    others = architecture.parameters - in_four_bits - (1 - recipe.ratio) * inner
    return int(four_bits * in_four_bits + in_int8 * (1 - recipe.ratio) * inner + backup * others)


def estimate_inner_bytes(architecture: Architecture, recipe: Recipe, group_size: int | None) -> int:
    """Size of the rounded matrices inside the layers, as `estimate_weight_bytes` counts them."""
    narrowest = min(input_widths(architecture))
    width = narrowest if group_size in (None, PER_CHANNEL) else group_size
    assert width is not None
    in_int8 = _bytes_per_weight(recipe, 8, True, width)
    bits = 4 if recipe.weights == "int4" else 8
    each = recipe.ratio * _bytes_per_weight(recipe, bits, recipe.is_symmetric, width) + (1 - recipe.ratio) * in_int8
    return int(each * inner_weights(architecture))


def inner_weights(architecture: Architecture) -> int:
    """Parameters that are neither embedding nor output layer; nearly all of them stand in the layers' matrices."""
    table = architecture.vocabulary * architecture.hidden_size
    return architecture.parameters - (table if architecture.tied_embeddings else 2 * table)


def _bytes_per_weight(recipe: Recipe, bits: int, symmetric: bool, width: int) -> float:
    """A code and its part of a group's scale (float32 in ONNX, float16 in OpenVINO) and zero point."""
    scale = 4.0 if recipe.format == "onnx" else 2.0
    return bits / 8 + (scale + (0.0 if symmetric else bits / 8)) / width


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
