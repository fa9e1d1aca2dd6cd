"""What a benchmark's figures are made into: sentences, tables, charts, Markdown, HTML."""

import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import msgspec
import pytest
from bench_results import CEILING, make_configuration, make_figures, make_result, steady
from hypothesis import given
from hypothesis import strategies as st

from normistral.commands.bench import result_lines
from normistral.evaluation.bench.report import (
    Scale,
    Series,
    character_bars,
    choose_ticks,
    draw_plots,
    line_chart,
    render_report,
)
from normistral.evaluation.bench.results import BenchResult, Spread
from normistral.evaluation.bench.tables import (
    bytes_,
    describe_bound,
    describe_method,
    judge_bound,
    machine_table,
    seconds,
    significant,
    speed_tables,
    summarise,
    with_range,
)

# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.012345, "0.0123"), (1.5, "1.50"), (9.999, "10.0"), (42.04, "42.0"), (100, "100"), (1234.5, "1,230")],
)
def test_three_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0032, "3.2 ms"),
        (0.00996, "0.01 s"),
        (0.264, "0.26 s"),
        (0.996, "1.0 s"),
        (2.14, "2.1 s"),
        (9.96, "10 s"),
        (119, "119 s"),
        (180, "3 min"),
    ],
)
def test_seconds_are_as_precise_as_a_person_cares(value, text):
    assert seconds(value) == text


def test_bytes_and_ranges():
    assert (bytes_(None), bytes_(93_600_000), bytes_(8_100_000_000)) == ("–", "93.6 MB", "8.10 GB")
    assert with_range(Spread(10.0, 9.0, 12.0, 3)) == "10.0 (9.00 to 12.0)"
    assert with_range(Spread(10.0, 10.0, 10.0, 1)) == "10.0"
    assert with_range(None) == "–"


def test_a_spread_is_median_least_and_largest():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([]) is None
    assert Spread(2.0, 1.0, 3.0, 3).width == 1.0
    assert Spread(2.0, 1.0, 3.0, 3).overlaps(Spread(4.0, 3.0, 5.0, 3))
    assert not Spread(2.0, 1.0, 2.9, 3).overlaps(Spread(4.0, 3.0, 5.0, 3))


# Advice


def test_configurations_that_met_different_memory_are_not_ranked():
    def measured(gb_per_s, writes, dropped=0):
        figures = make_figures(writes=writes)
        around = steady(gb_per_s)
        decode = [dataclasses.replace(one, bandwidth_gb_per_s=around, dropped=dropped) for one in figures.decode]
        return dataclasses.replace(figures, decode=tuple(decode))

    slow, fast = make_configuration("a", measured(37.0, 10.0, dropped=2)), make_configuration("b", measured(66.0, 15.0))
    summary = summarise(make_result(slow, fast))
    assert "a and b: which writes faster cannot be told" in " ".join(sorted(summary.comparison)).replace(
        "b and a", "a and b"
    )
    assert "(37.0 GB/s)" in " ".join(summary.configurations["a"])
    assert any(doubt.startswith("a: 4 decode measurements did not count") for doubt in summary.doubts)
    same = make_configuration("b", measured(37.0, 15.0))
    assert "b writes fastest, 1.50 times as fast as a." in summarise(make_result(slow, same)).comparison
    shown = "\n".join(result_lines(make_result(slow)))
    assert "80% of 37.0 (36.6 to 37.4) GB/s" in shown


@pytest.mark.parametrize(("share", "bound"), [(0.9, "memory"), (0.7, "memory"), (0.5, "both"), (0.39, "compute")])
def test_the_share_says_what_is_the_limit(share, bound):
    assert judge_bound(share) == bound


@pytest.mark.parametrize(
    ("writes", "sentence"),
    [
        (10.0, "40.0 GB/s, 80% of what memory gives (50.0 GB/s): faster memory, or smaller weights, would help"),
        (3.0, "12.0 GB/s, 24% of what memory gives (50.0 GB/s): arithmetic is the limit"),
        (7.0, "28.0 GB/s, 56% of what memory gives (50.0 GB/s): both hold it back"),
    ],
)
def test_advice_to_a_buyer(writes, sentence):
    figures = make_figures(writes=writes)
    assert sentence in describe_bound(make_configuration(figures=figures), figures, make_result())


def test_a_model_that_lies_in_the_cache_gives_no_advice():
    one = make_configuration(weight_bytes_per_token=100_000_000)
    assert "partly in the processor's caches" in describe_bound(one, one.figures, make_result(one))


def test_nothing_is_said_of_memory_that_was_not_measured():
    decode = tuple(dataclasses.replace(point, share=None) for point in make_figures().decode)
    one = make_configuration(figures=make_figures(decode=decode), device="GPU")
    result = make_result(one)
    assert "memory of GPU was not measured" in summarise(result).configurations["sju"][-1]
    assert [plot.title for plot in draw_plots(result)] == ["Writing: tokens a second", "Reading: tokens a second"]


def test_the_summary_is_what_a_buyer_wants_to_know():
    (sentences,) = summarise(make_result()).configurations.values()
    assert sentences[:3] == (
        "It writes 10.0 tokens a second, about 6.7 Norwegian words (faster than people read), and 8.00 after 2,048 "
        "tokens of conversation.",
        "It reads a page (400 words) in 6.8 s, begins to answer a question after 2.5 s, and the next one after 0.70 s.",
        "It takes 8.10 GB of memory at most and is ready 6.0 s after its start.",
    )


@pytest.mark.parametrize(("writes", "words"), [(3.0, "slower than people"), (6.0, "about as fast as people")])
def test_speed_beside_reading(writes, words):
    result = make_result(make_configuration(figures=make_figures(writes=writes)))
    assert words in summarise(result).configurations["sju"][0]


def test_joules_become_words_of_a_watt_hour():
    decode = tuple(dataclasses.replace(point, tokens_per_joule=steady(0.5)) for point in make_figures().decode)
    result = make_result(make_configuration(figures=make_figures(decode=decode)))
    assert "A watt-hour writes about 1,200 words." in summarise(result).configurations["sju"]
    assert "Writing, tokens/joule" in [table.title for table in speed_tables(result)]


def test_the_fastest_is_named_only_where_it_is_certain():
    fast = make_configuration("rask", make_figures(writes=12.0))
    slow = make_configuration("sein", make_figures(writes=8.0))
    assert summarise(make_result(slow, fast)).comparison == (
        "rask writes fastest, 1.50 times as fast as sein.",
        "sein and rask: which reads faster cannot be told from these measurements.",
    )
    assert summarise(make_result(slow)).comparison == ()


def test_doubts_are_told():
    assert summarise(make_result()).doubts == ()
    noisy = dataclasses.replace(make_figures().decode[0], tokens_per_s=Spread(10.0, 8.0, 11.0, 5))
    figures = make_figures(decode=(noisy,), output_sha256=("a", "b"), idle_cpu_share=0.5)
    result = make_result(make_configuration(figures=figures))
    (bandwidth,) = result.bandwidth
    wide = dataclasses.replace(bandwidth, gb_per_s=Spread(40.0, 25.0, CEILING, 6))
    small = dataclasses.replace(wide, best=dataclasses.replace(wide.best, buffer_bytes=2**20))
    doubts = "\n".join(summarise(dataclasses.replace(result, bandwidth=(small,))).doubts)
    for words in (
        "between 8.00 and 11.0",
        "did not always write the same",
        "50% busy",
        "25.0 to 50.0",
        "too little memory",
    ):
        assert words in doubts


def test_models_that_were_loaded_in_turn_disturbed_nobody():
    result = make_result(make_configuration(figures=make_figures(idle_cpu_share=0.5)), interleaving="reloaded")
    assert summarise(result).doubts == ()


def test_more_than_memory_gives_is_doubted():
    fast = make_configuration(figures=make_figures(writes=14.0))
    assert "that figure is too low" in "".join(summarise(make_result(fast)).doubts)
    cached = make_configuration(figures=make_figures(writes=14.0), weight_bytes_per_token=10**8)
    assert summarise(make_result(cached)).doubts == ()


def test_a_failure_is_in_every_report():
    bad = dataclasses.replace(make_configuration("dårlig"), figures=None, problem="it crashed (SIGILL)")
    result = make_result(make_configuration(), bad)
    for text in (render_report(result, ".html"), render_report(result, ".md"), "\n".join(result_lines(result))):
        assert "it crashed (SIGILL)" in text
        assert "6.7 Norwegian words" in text  # the other one is there
    alone = make_result(bad)
    assert draw_plots(alone) == speed_tables(alone) == []
    assert "it crashed" in render_report(alone, ".html")


# Charts


@given(st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_reach_the_highest(highest):
    ticks = choose_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-8)
    assert 2 <= len(ticks) <= 6
    assert ticks[-2] < highest  # none more than is needed
    assert float(f"{ticks[1]:.0e}") == pytest.approx(ticks[1])
    assert f"{ticks[1]:.0e}"[0] in "125"


def test_scales():
    linear, logarithmic = Scale(0, 10, 100, 200), Scale(1, 100, 0, 50, logarithmic=True)
    assert (linear(0), linear(5), linear(10)) == (100, 150, 200)
    assert (logarithmic(1), logarithmic(10), logarithmic(100)) == pytest.approx((0, 25, 50))
    assert Scale(16, 16, 0, 50, logarithmic=True)(16) == 25


def test_a_line_chart_is_drawn_to_scale():
    svg = line_chart("Fart", "tokens", [Series("æ<b>", ((10, steady(50.0)), (20, steady(100.0))))])
    tree = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    circles = tree.findall(f".//{name}circle")
    low, high = (float(circle.get("cy")) for circle in circles)
    base = max(
        float(line.get("y1")) for line in tree.findall(f"{name}line[@class='grid']") if line.get("y1") == line.get("y2")
    )
    assert (base - high) == pytest.approx(2 * (base - low), abs=0.2)  # twice as fast, twice as high
    assert circles[0].find(f"{name}title").text.startswith("æ<b>: 50.0")


def test_character_bars_are_to_scale():
    assert character_bars([("a", 8.0, "8"), ("bb", 4.0, "4"), ("c", 0.0, "0")], 8.0) == (
        "a   " + "█" * 40 + " 8",
        "bb  " + "█" * 20 + " 4",
        "c    0",
    )


# Documents


class Tags(HTMLParser):
    """Collects what a page loads or runs, and checks that tags are closed in order."""

    VOID = ("meta", "wbr")

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.names = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "style", "onload")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


HOSTILE = "<script>alert(1)</script>&|*_`å"


def test_the_page_needs_nothing_else_and_escapes_names():
    page = render_report(make_result(make_configuration(HOSTILE), make_configuration("b")), ".html")
    tags = Tags()
    tags.feed(page)
    assert tags.open == tags.addresses == []
    assert "script" not in tags.names
    assert "link" not in tags.names
    assert "url(" not in page
    assert "@import" not in page
    assert re.findall(r"https?://[^\"<\s]+", page.replace("http://www.w3.org/2000/svg", "")) == []
    assert "Prosessor på Åsen" in page
    assert '<meta charset="utf-8">' in page
    assert page.count("<svg") == 3


def test_markdown_tables_are_whole():
    text = render_report(make_result(make_configuration(HOSTILE), make_configuration("b")), ".md")
    outside_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script>" not in outside_code.replace("\\<script\\>", "")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows
    widths = []
    for line in text.splitlines():
        if line.startswith("| "):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(widths)) <= 1
            widths = []
    assert "█" in text


def test_the_terminal_shows_the_same_figures():
    text = "\n".join(result_lines(make_result()))
    assert "10.0 (9.90 to 10.1)" in text
    assert "80% (40.0 GB/s)" in text
    assert "50.0 GB/s (dot of float32, 1.07 GB); 47.0 to 50.0 in 6 measurements" in text
    assert "abababababab" in text


def test_how_it_was_measured_is_what_was_done():
    two = make_result(make_configuration(), make_configuration("b"))
    assert "took turns at every single measurement" in describe_method(two)[0]
    assert "every round loaded them" in describe_method(dataclasses.replace(two, interleaving="reloaded"))[0]
    assert "nothing had to take turns" in describe_method(make_result())[0]


def test_tuned_settings_are_called_so():
    assert "openvino int4, CPU, tuned here" in render_report(make_result(), ".md")


def test_a_containers_limit_is_told():
    machine = dataclasses.replace(make_result().machine, cpu_quota=1.5)
    assert ("container's CPU limit", "1.5 CPUs") in machine_table(make_result(machine=machine)).rows


def test_json_brings_the_result_back():
    result = make_result()
    assert msgspec.json.decode(msgspec.json.encode(result), type=BenchResult) == result
