"""The load generator tells what became of each answer."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "serving"))

import load


def test_questions_are_all_different():
    assert len(set(load.make_questions(200))) == 200


@pytest.mark.parametrize(
    ("text", "problem", "verdict"),
    [("one", "", "same"), ("two", "", "mixed"), ("three", "", "changed"), ("one", "lost", "lost"), ("", "x", "x")],
)
def test_an_answer_is_judged_by_what_was_said_alone(text, problem, verdict):
    answer = load.Answer(0, text, problem=problem)
    assert load.judge(answer, {0: "one", 1: "two"}) == verdict


def test_a_server_that_is_not_there_is_an_error_of_its_kind():
    async def ask():
        async with load.httpx.AsyncClient() as client:
            return await load.ask(client, load.Server("http://127.0.0.1:9", "m", None, None), 3, "question", 5)

    answer = asyncio.run(ask())
    assert (answer.question, answer.problem) == (3, "ConnectError")
