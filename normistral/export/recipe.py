"""How the weights are stored: the choices, their one default each, and what they come to in bytes.

It knows nothing of the tool that does the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from normistral.errors import UsageError
from normistral.manifest import Architecture, RecipeRecord
from normistral.presets import WeightFormat

GROUP_SIZES = (128, 64, 32, 16)
"""Weights per int4 scale, best first: larger groups decode faster and take fewer bytes."""

PER_CHANNEL = -1

Backup = Literal["int8_asym", "int8_sym", "fp"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user may choose; the defaults are the ones in force everywhere.

    Attributes:
        weights: "int4", "int8" or "fp16".
        group_size: weights that share one int4 scale (128, 64, 32 or 16), or -1 for one scale per output channel.
            None takes the largest that divides the widths of this model.
        symmetric: rounding to a grid around zero, without zero points; for int4 and int8. Symmetric int4 decodes a
            third faster than asymmetric int4 on CPUs and costs no quality that could be measured.
        ratio: share of the inner layers' weights in int4, above 0 and up to 1; the most sensitive layers (by
            their rounding error) take `backup` instead.
        backup: precision of the layers that are not int4 (embedding, output layer, what `ratio` leaves): "int8_asym",
            "int8_sym", or "fp" to leave them as they are in the checkpoint.
        output_layer_bits: 8 stores the output layer in `backup`, 4 in int4. An embedding that is tied to it goes along.
    """

    weights: WeightFormat = "int4"
    group_size: int | None = None
    symmetric: bool = True
    ratio: float = 1.0
    backup: Backup = "int8_asym"
    output_layer_bits: int = 8

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range, or for one that this weight format would ignore."""
        _require_one_of("weights", self.weights, ("int4", "int8", "fp16"))
        _require_one_of("group_size", self.group_size, (None, *GROUP_SIZES, PER_CHANNEL))
        _require_one_of("symmetric", self.symmetric, (True, False))
        _require_one_of("backup", self.backup, ("int8_asym", "int8_sym", "fp"))
        _require_one_of("output_layer_bits", self.output_layer_bits, (4, 8))
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0.0 < self.ratio <= 1.0:
            raise UsageError(f"ratio must be a number above 0 and up to 1, not {self.ratio!r}", "1 is every layer")
        meaningful = {"int4": {field.name for field in fields(self)}, "int8": {"symmetric"}, "fp16": set()}
        for field in fields(self)[1:]:
            if getattr(self, field.name) != field.default and field.name not in meaningful[self.weights]:
                raise UsageError(
                    f"{field.name} means nothing for {self.weights} weights", "leave it out, or use int4 weights"
                )
        if self.output_layer_bits == 8 and self.backup == "fp":
            raise UsageError(
                "an output layer of 8 bits needs an 8-bit backup, not fp",
                "use backup int8_asym, or 4 output layer bits",
            )


def choose_recipe(weights: str, options: dict[str, Any]) -> Recipe:
    """Check the user's options.

    Raises:
        UsageError: an unknown option or an impossible value.
    """
    known = [field.name for field in fields(Recipe)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}", f"recipe options are: {', '.join(known[1:])}")
    return Recipe(weights=weights, **options)  # type: ignore[arg-type]


def input_widths(architecture: Architecture) -> tuple[int, ...]:
    """Input features of the layers that are rounded: int4 groups are cut along them."""
    attention = architecture.heads * architecture.head_dim
    return tuple(sorted({architecture.hidden_size, attention, architecture.feed_forward}))


def choose_group_size(architecture: Architecture, wanted: int | None = None) -> int:
    """The group size to use: `wanted` if it fits, else the largest allowed one that divides every width.

    Returns:
        weights per int4 scale; -1 (one scale per output channel) when none divides them.

    Raises:
        UsageError: `wanted` was asked for and does not divide the widths.
    """
    widths = input_widths(architecture)
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if wanted is None:
        return fitting[0] if fitting else PER_CHANNEL
    if wanted != PER_CHANNEL and wanted not in fitting:
        choices = ", ".join(str(size) for size in [*fitting, PER_CHANNEL])
        raise UsageError(
            f"group size {wanted} does not divide all of the model's widths {', '.join(map(str, widths))}",
            f"for this model choose one of: {choices}",
        )
    return wanted


def describe_recipe(recipe: Recipe, group_size: int) -> str:
    """The recipe in a few words: "int4 symmetric, group 64, output layer int8"."""
    if recipe.weights == "fp16":
        return "fp16"
    grid = "symmetric" if recipe.symmetric else "asymmetric"
    if recipe.weights == "int8":
        return f"int8 {grid}, per channel"
    groups = "per channel" if group_size == PER_CHANNEL else f"group {group_size}"
    mixed = "" if recipe.ratio == 1.0 else f", {recipe.ratio:.0%} of the layers"
    output = recipe.backup if recipe.output_layer_bits == 8 else "int4"
    return f"int4 {grid}, {groups}{mixed}, output layer {output}"


def record_recipe(recipe: Recipe, group_size: int) -> RecipeRecord:
    """The recipe as the manifest keeps it; what means nothing for this weight format stays None."""
    if recipe.weights == "fp16":
        return RecipeRecord("fp16")
    if recipe.weights == "int8":
        return RecipeRecord("int8", symmetric=recipe.symmetric)
    return RecipeRecord(
        "int4",
        symmetric=recipe.symmetric,
        group_size=group_size,
        ratio=float(recipe.ratio),
        backup=recipe.backup,
        output_layer_bits=recipe.output_layer_bits,
    )


def estimate_weight_bytes(architecture: Architecture, recipe: Recipe, group_size: int) -> int:
    """Size of the stored weights in bytes: what the bits come to, scales (float16) and zero points included."""
    table = architecture.vocabulary * architecture.hidden_size  # embedding, and output layer
    tables = table if architecture.tied_embeddings else 2 * table
    inner = architecture.parameters - tables
    if recipe.weights == "fp16":
        return 2 * architecture.parameters
    eight_bits = 1.0 + 3 / min(input_widths(architecture))  # per channel: a float16 scale and an 8-bit zero point
    if recipe.weights == "int8":
        return int(eight_bits * architecture.parameters)
    width = min(input_widths(architecture)) if group_size == PER_CHANNEL else group_size
    four_bits = 0.5 + (2.0 if recipe.symmetric else 2.5) / width
    backup = 2.0 if recipe.backup == "fp" else eight_bits
    in_four_bits = recipe.ratio * inner
    if recipe.output_layer_bits == 4:
        in_four_bits += table
    return int(four_bits * in_four_bits + backup * (architecture.parameters - in_four_bits))


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
