"""Rotary positions of a config.json: rope_theta and rope_scaling (transformers 4) or rope_parameters (5).

What comes out is transformers 4's form, which is the one that the exporter's tools read.
"""

from __future__ import annotations

from typing import Any

from normistral.errors import CheckpointError
from normistral.export.checkpoint.families.base import Config
from normistral.export.checkpoint.fields import (
    AS_PUBLISHED,
    MAX_POSITIONS,
    KnownField,
    check_fields,
    harmless,
    harmless_at,
    read_flag,
    read_integer,
    read_number,
    shorten,
    used,
)

DEFAULT_THETA = 10000.0  # of transformers' LlamaConfig and MistralConfig
# The types of scaling: their fields, and whether each has to be there.
SCALINGS = {
    "linear": {"factor": True},
    "dynamic": {"factor": True},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True},
    "yarn": {
        "factor": True,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
    },
}
_HAS_TRAINED_LENGTH = ("llama3", "yarn")
_UNREAD = harmless("read with the types of scaling that have it")
ROPE_FIELDS: dict[str, KnownField] = {
    "rope_type": used("the type of scaling"),
    "type": used("the type of scaling, as it was called first"),
    "rope_theta": used("base of the angles"),
    "partial_rotary_factor": harmless_at(1.0, reason="only a part of each head is turned"),
    "finetuned": harmless("of the first YaRN models; transformers does not read it"),
    "original_max_position_embeddings": used("trained context, of llama3 and yarn"),
    "truncate": used("of yarn"),
    **{name: used(f"of {kind}") for kind, names in reversed(SCALINGS.items()) for name in names},
}


def read_rope(config: Config) -> Config:
    """The fields rope_theta and rope_scaling, from whichever form they are given in.

    Raises:
        CheckpointError: forms that contradict each other, positions that differ between layers, or a type of scaling
            that is not supported.
    """
    forms = {name: _as_object(config, name) for name in ("rope_scaling", "rope_parameters")}
    thetas = {"rope_theta": config.get("rope_theta")}
    scalings: dict[str, Config | None] = {}
    for name, form in forms.items():
        if form:
            thetas[f"{name}.rope_theta"] = form.get("rope_theta")
            scalings[name] = _read_scaling(form, name, config)
    given = {name: read_number({name: theta}, name, 1.0, 1e12) for name, theta in thetas.items() if theta is not None}
    _require_one("rope_theta", given)
    _require_one("the scaling of positions", scalings)
    theta, scaling = next(iter(given.values()), DEFAULT_THETA), next(iter(scalings.values()), None)
    if scaling is not None and scaling["rope_type"] == "yarn" and theta == 1.0:
        raise CheckpointError("config.json: yarn needs a rope_theta above 1", AS_PUBLISHED)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _as_object(config: Config, name: str) -> Config:
    form = config.get(name)
    if form is None:
        return {}
    if not isinstance(form, dict):
        raise CheckpointError(f"config.json: {name} is {shorten(form)}, not an object", AS_PUBLISHED)
    layered = [key for key, value in form.items() if isinstance(value, dict)]
    if layered:
        raise CheckpointError(
            f"config.json: {name} gives layers positions of their own ({', '.join(map(shorten, layered[:4]))}), which "
            "is not supported",
            "transformers' Llama and Mistral know one kind of positions for all layers",
        )
    return form


def _read_scaling(form: Config, where: str, config: Config) -> Config | None:
    """One form's scaling; None where positions are not scaled."""
    kinds = {form[key] for key in ("rope_type", "type") if isinstance(form.get(key), str)}
    if len(kinds) > 1:
        raise CheckpointError(
            f"config.json contradicts itself: {where} is of type {' and '.join(sorted(kinds))}", AS_PUBLISHED
        )
    kind = kinds.pop() if kinds else form.get("rope_type", form.get("type"))
    if kind not in (None, "default") and (not isinstance(kind, str) or kind not in SCALINGS):
        raise CheckpointError(
            f"config.json: {where} of type {shorten(kind)} is not supported", f"supported are: {', '.join(SCALINGS)}"
        )
    check_fields(form, ROPE_FIELDS, "config.json", inside=where)
    if kind == "default" or (kind is None and form.keys() <= {"rope_type", "rope_theta", "partial_rotary_factor"}):
        return None
    if kind is None:
        raise CheckpointError(f"config.json: {where} has no rope_type", f"supported are: {', '.join(SCALINGS)}")
    clean: Config = {"rope_type": kind}
    for name, required in SCALINGS[kind].items():
        if required or form.get(name) is not None:
            clean[name] = read_number(form, name, 1e-3, 1e6)
    if kind in _HAS_TRAINED_LENGTH:
        positions = config.get("max_position_embeddings") if kind == "yarn" else None  # as transformers falls back
        clean["original_max_position_embeddings"] = read_integer(
            form, "original_max_position_embeddings", 1, MAX_POSITIONS, positions
        )
    if kind == "yarn":
        clean["truncate"] = read_flag(form, "truncate", True)
    if clean.get("low_freq_factor", 0.0) >= clean.get("high_freq_factor", 1e9):
        raise CheckpointError(f"config.json: {where} needs low_freq_factor below high_freq_factor", AS_PUBLISHED)
    return clean


def _require_one(what: str, values: dict[str, Any]) -> None:
    """Several places have to say the same."""
    if any(value != next(iter(values.values())) for value in values.values()):
        said = ", ".join(f"{name} {shorten(value)}" for name, value in values.items())
        raise CheckpointError(f"config.json contradicts itself about {what}: {said}", AS_PUBLISHED)
