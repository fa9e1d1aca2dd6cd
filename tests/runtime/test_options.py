"""Generation options: ranges, unknown names, and who wins."""

from dataclasses import fields, replace
from typing import Any

import pytest

from normistral.artifact.manifest import SamplingDefaults
from normistral.errors import UsageError
from normistral.runtime.options import GenerationConfig, resolve_options
from normistral.runtime.structured.structure import Structure

NOTHING_PUBLISHED = SamplingDefaults()
NORMISTRAL = SamplingDefaults(temperature=0.3, top_k=64, top_p=0.9, repetition_penalty=1.0, max_new_tokens=1024)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [1, 2**31]),
        ("temperature", [0, 0.0, 0.7, 100]),
        ("top_k", [0, 1, 64]),
        ("top_p", [0.001, 0.9, 1, 1.0]),
        ("min_p", [0, 0.05, 1.0]),
        ("repetition_penalty", [0.01, 1, 1.3, 100.0]),
        ("seed", [None, 0, 2**64 - 1]),
        ("ignore_eos", [True, False]),
        ("logprobs", [None, 0, 100]),
        ("max_reasoning_tokens", [None, 0, 1, 2**31]),
        ("draft", ["auto", "off"]),
        ("structure", [None, Structure.regex("[a-zæøå]+"), Structure.json_object()]),
    ],
)
def test_values_in_range_are_kept(name: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(resolve_options(NOTHING_PUBLISHED, {name: value}), name) == value


def test_minus_one_is_any_seed_and_all_tokens() -> None:
    """Clients of vLLM and llama.cpp send it."""
    config = resolve_options(
        NOTHING_PUBLISHED, {"seed": -1, "top_k": -1, "max_new_tokens": -1, "dry_penalty_last_n": -1}
    )
    assert (config.seed, config.top_k) == (None, 0)
    assert (config.max_new_tokens, config.dry_penalty_last_n) == (2**31, 2**31)
    assert replace(config, seed=-1).seed is None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -2, 2**31 + 1, 1.0, "10", None, True]),
        ("temperature", [-0.1, 100.1, float("nan"), float("inf"), "hot", None, True]),
        ("top_k", [-2, -1.0, 1.5, "40", None, False]),
        ("top_p", [0, 0.0, -0.1, 1.01, float("nan"), None]),
        ("min_p", [-0.1, 1.1, float("nan"), None]),
        ("repetition_penalty", [0, 0.0, -1.0, 101, float("inf"), None]),
        ("typical_p", [0, 0.0, -0.1, 1.01, float("nan"), None]),
        ("presence_penalty", [-2.1, 2.1, float("nan"), "0", None, True]),
        ("frequency_penalty", [-2.1, 2.1, float("nan"), "0", None, True]),
        ("dry_multiplier", [-0.1, 101, None]),
        ("dry_base", [0.9, 101, float("inf"), None]),
        ("dry_allowed_length", [0, 1.0, None]),
        ("dry_penalty_last_n", [-2, 1.0, None]),
        ("dry_sequence_breakers", [("",), (-1,), (True,), "a", (1.0,), None]),
        ("xtc_probability", [-0.1, 1.1, None]),
        ("xtc_threshold", [-0.1, 0.6, None]),
        ("logit_bias", [{"5": 1}, {5: 101}, {-1: 1}, {5: None}, {5: True}, [(5, 1)], ((5,),), 5, None]),
        ("seed", [-2, -1.0, 2**64, 1.0, "1", True]),
        ("stop", [("",), ["a", ""], (1,), 7, {"a"}, b"a"]),
        ("ignore_eos", [1, 0, "yes", None]),
        ("logprobs", [-1, 101, 1.0, True]),
        ("prompt_logprobs", [-1, 101, 1.0, True]),
        ("max_reasoning_tokens", [-1, 2**31 + 1, 1.0, "5", False]),
        ("draft", ["on", "", None, True, 4, ["auto"]]),
        ("structure", ["json", {"type": "object"}, True]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=name) as caught:
            resolve_options(NOTHING_PUBLISHED, {name: value})
        assert caught.value.exit_code == 2


def test_each_option_has_its_ranges_tested_here() -> None:
    tested = test_values_out_of_range_are_refused_by_name.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {name for name, _ in tested} == {field.name for field in fields(GenerationConfig)}


@pytest.mark.parametrize(
    ("given", "texts"), [("\n", ("\n",)), (["a", "b"], ("a", "b")), (("æ",), ("æ",)), (None, ()), ((), ())]
)
def test_stop_may_be_one_text_or_several(given: Any, texts: tuple[str, ...]) -> None:
    assert resolve_options(NOTHING_PUBLISHED, {"stop": given}).stop == texts


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown option max_tokens, temprature") as caught:
        resolve_options(NOTHING_PUBLISHED, {"temprature": 0.5, "max_tokens": 5, "seed": 1})
    assert "temperature" in caught.value.hint
    assert "max_new_tokens" in caught.value.hint


def test_without_options_ours_are_the_defaults() -> None:
    assert resolve_options(NOTHING_PUBLISHED, {}) == GenerationConfig()


def test_the_authors_defaults_win_over_ours() -> None:
    options = resolve_options(NORMISTRAL, {})
    assert (options.temperature, options.top_k, options.top_p, options.max_new_tokens) == (0.3, 64, 0.9, 1024)
    assert options.min_p == GenerationConfig().min_p  # they say nothing of it


def test_the_caller_wins_over_the_authors() -> None:
    options = resolve_options(NORMISTRAL, {"temperature": 0, "top_k": 0})
    assert (options.temperature, options.top_k, options.top_p) == (0, 0, 0.9)


def test_the_authors_defaults_are_checked_too() -> None:
    with pytest.raises(UsageError, match="top_p"):
        resolve_options(SamplingDefaults(top_p=0.0), {})


def test_the_callers_dictionary_is_left_alone() -> None:
    given = {"stop": ["a"]}
    resolve_options(NORMISTRAL, given)
    assert given == {"stop": ["a"]}
