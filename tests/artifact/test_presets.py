"""The presets: complete, consistent, and found by either name."""

from dataclasses import FrozenInstanceError

import pytest
from family_shapes import SHAPES

from normistral.artifact.presets import PRESETS, Preset, find_preset

UNSEEN = ("11b-translate", "11b-long")  # nothing but their names is known


def test_the_family_and_the_demo_model_are_there() -> None:
    assert [(preset.name, preset.role) for preset in PRESETS] == [
        ("demo", "chat"),
        ("7b-warm-instruct", "chat"),
        ("7b-warm", "base"),
        ("7b-scratch", "base"),
        ("norbloom-7b-scratch", "base"),
        ("11b-warm", "base"),
        ("11b-thinking", "chat"),
        ("11b-translate", None),
        ("11b-long", None),
    ]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_preset_has_exactly_one_source_and_is_found_by_its_names(preset: Preset) -> None:
    assert (preset.repository is None) != (preset.package is None)
    assert find_preset(preset.name) is preset
    if preset.repository is not None:
        assert preset.repository == f"norallm/normistral-{preset.name}".replace("normistral-norbloom", "norbloom")
        assert preset.source == preset.repository
        assert find_preset(preset.repository) is preset
    else:
        assert preset.source == f"pypi:{preset.package}"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_facts_are_plausible(preset: Preset) -> None:
    assert preset.licence == (None if preset.name in UNSEEN else "Apache-2.0")
    assert (preset.role is None) == (preset.name in UNSEEN)
    assert preset.context_length is None or preset.context_length >= 2048
    assert preset.parameters is None or 10**8 < preset.parameters < 2 * 10**10
    assert preset.rope_theta == (None if preset.name in (*UNSEEN, "11b-thinking") else SHAPES[preset.name].rope_theta)
    assert preset.quirks
    assert all(quirk == quirk.strip() and "\n" not in quirk for quirk in preset.quirks)


def test_names_are_unique() -> None:
    names = [name for preset in PRESETS for name in (preset.name, preset.repository) if name is not None]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["", "DEMO", "normistral-7b-warm", "norallm", "7b"])
def test_other_names_are_no_preset(name: str) -> None:
    assert find_preset(name) is None


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESETS[0].licence = "other"  # type: ignore[misc]


def test_only_the_demo_has_defaults_of_ours() -> None:
    """NorMistral's published settings are never changed."""
    assert [(preset.name, preset.max_new_tokens) for preset in PRESETS if preset.max_new_tokens is not None] == [
        ("demo", 256)
    ]
    assert [preset.name for preset in PRESETS if preset.recipe is not None] == ["demo"]
