"""Talk to a server with the clients that people have, and print a line for each thing tried.

    python tests/scripts/clients.py ARTIFACT [LITELLM LM_EVAL]    (make test-clients: the demo model)

The packages openai, langchain-openai (with an agent), ollama, anthropic and `llm`; a litellm proxy in front and
lm-evaluation-harness's local-completions, each a program of an environment of its own; and requests as Open WebUI and
Home Assistant send them. What depends on an answer's words goes to a scripted model behind the real server. Exits with
1 if one of them got something else than it should.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import openai
from clients_scripted import try_scripted
from langchain_openai import ChatOpenAI

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
KEY = "a-key-for-the-clients"
QUESTION = "What is the capital of Norway?"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 9_999_999},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
_wrong = 0


def check(client: str, what: str, right: bool, got: object) -> None:
    global _wrong
    _wrong += not right
    print(f"{'ok ' if right else 'BAD'} {client:<10} {what:<28} {str(got)[:90]!r}", flush=True)


@contextmanager
def serving(python: str, artifact: str) -> Iterator[tuple[str, str]]:
    """URL and model of a server with a key."""
    process = subprocess.Popen(
        [python, "-m", "normistral", "serve", artifact, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NORMISTRAL_API_KEYS": KEY},
    )
    try:
        assert process.stdout is not None
        start = json.loads(process.stdout.readline())
        while httpx.get(f"{start['url']}/ready").status_code != 200:
            pass
        yield f"{start['url']}/v1", start["models"][0]
    finally:
        process.terminate()
        check("server", "exit code after SIGTERM", process.wait(60) == 0, process.returncode)


def fits(text: str) -> bool:
    """Whether it is JSON of SCHEMA."""
    document = json.loads(text)
    return set(document) == {"city", "people"} and isinstance(document["people"], int)


def try_openai(url: str, model: str) -> None:
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    asked = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    create: Callable[..., openai.types.chat.ChatCompletion] = client.chat.completions.create
    answer = create(**asked, max_completion_tokens=40)
    text = answer.choices[0].message.content or ""
    check("openai", "chat", "Oslo" in text and answer.choices[0].finish_reason == "stop", text)
    check("openai", "usage", answer.usage is not None and answer.usage.total_tokens > 20, answer.usage)
    stream = client.chat.completions.create(
        **asked, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    said = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    check("openai", "streaming says the same", said == text, said)
    check(
        "openai",
        "usage of a stream",
        events[-1].usage == answer.usage or events[-1].usage is not None,
        events[-1].usage,
    )
    cut = create(**asked, stop=["Oslo"]).choices[0]
    check("openai", "stop", cut.message.content == text.partition("Oslo")[0], cut.message.content)
    two = [create(**asked | {"temperature": 1}, seed=7, max_tokens=12).choices[0].message.content for _ in "12"]
    check("openai", "seed", two[0] == two[1], two[0])
    many = create(**asked | {"temperature": 1}, n=3, max_tokens=8).choices
    check("openai", "n", len({choice.message.content for choice in many}) > 1, [c.message.content for c in many])
    logprobs = create(**asked, logprobs=True, top_logprobs=3, max_tokens=5).choices[0].logprobs
    first = logprobs.content[0] if logprobs and logprobs.content else None
    check("openai", "logprobs", first is not None and len(first.top_logprobs) == 3, first and first.token)
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    written = create(**asked, response_format=form, max_tokens=60).choices[0]
    check("openai", "JSON schema", fits(written.message.content or ""), written.message.content)
    completed = client.completions.create(model=model, prompt="Oslo is the capital of", max_tokens=4, temperature=0)
    check("openai", "text completion", completed.choices[0].finish_reason == "length", completed.choices[0].text)
    check("openai", "models", [one.id for one in client.models.list()] == [model], model)
    long = [{"role": "user", "content": "x " * 20_000}]
    for what, kind, act in (
        ("an unknown model", openai.NotFoundError, lambda: create(**asked | {"model": "gpt-4"})),
        ("functions", openai.BadRequestError, lambda: create(**asked, functions=[{"name": "f"}])),
        ("a wrong key", openai.AuthenticationError, lambda: client.with_options(api_key="wrong").models.list()),
        ("too long", openai.BadRequestError, lambda: create(**asked | {"messages": long})),
    ):  # fmt: skip
        try:
            check("openai", what, False, act())
        except openai.APIStatusError as error:
            check("openai", what, isinstance(error, kind), f"{type(error).__name__} {error.code}: {error.body}")


def try_document(url: str, model: str) -> None:
    """The block of docs/serving.md, with this server's address, key and model."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from openai .*?)```", text, re.DOTALL)
    for shown, here in (
        ("http://127.0.0.1:8000/v1", url),
        ('"none"', repr(KEY)),
        ("7b-warm-instruct-openvino-int4", model),
    ):
        assert code.count(shown) == 1, shown
        code = code.replace(shown, here)
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "docs/serving.md", "exec"), {})
    check("openai", "docs/serving.md", len(printed.getvalue()) > 1, printed.getvalue())


def try_langchain(url: str, model: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key=KEY, model=model, temperature=0, max_tokens=40, max_retries=0)
    answer = chat.invoke([("system", "You are brief."), ("user", QUESTION)])
    check("langchain", "chat", "Oslo" in str(answer.content), answer.content)
    check("langchain", "usage", bool(answer.usage_metadata), answer.usage_metadata)
    pieces = [str(piece.content) for piece in chat.stream([("system", "You are brief."), ("user", QUESTION)])]
    check("langchain", "streaming says the same", "".join(pieces) == answer.content and len(pieces) > 3, len(pieces))
    cut = chat.invoke(QUESTION, stop=["Oslo"])
    check("langchain", "stop", "Oslo" not in str(cut.content), cut.content)
    structured = chat.with_structured_output({"title": "city", **SCHEMA}, method="json_schema")
    document = structured.invoke("Name a city and how many people live there.")
    check("langchain", "JSON schema", fits(json.dumps(document)), document)


def try_required(url: str, model: str) -> None:
    """Calls of the demo model, which chooses no tool by itself."""
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    tool: Any = {"type": "function", "function": {"name": "city", "description": "Note a city.", "parameters": SCHEMA}}
    named: Any = {"type": "function", "function": {"name": "city"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Note Oslo, where 700000 people live."}],
            tools=[tool],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=100,
        ).choices[0]
        calls = answer.message.tool_calls or []
        valid = len(calls) == 1 and calls[0].type == "function" and fits(calls[0].function.arguments)
        check("openai", f"tool_choice {str(choice)[:12]}", valid and answer.finish_reason == "tool_calls", calls)


def try_lm_eval(program: str, url: str, model: str, artifact: str) -> None:
    """lm-evaluation-harness over the API, against its own scores of the library."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"model={model},base_url={url}/completions,tokenizer={Path(artifact).resolve()},num_concurrent=1"
        command = [program, "--model", "local-completions", "--model_args", arguments]
        command += ["--tasks", "norsk_choices,norsk_completion", "--include_path", "tests/lm_eval_tasks"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": folder}
        ran = subprocess.run(
            [*command, "--output_path", folder],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "OPENAI_API_KEY": KEY, **offline},
        )
        found = list(Path(folder).rglob("results_*.json"))
        scores = json.loads(found[0].read_text())["results"] if found else {}
        right = ran.returncode == 0 and {"norsk_choices", "norsk_completion"} <= set(scores)
        check("lm-eval", "local-completions", right, scores or ran.stderr[-400:])


def try_llm(url: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        # No plugins: the package that carries the demo model is one, and lacks its dependencies here.
        environment = {**os.environ, "LLM_USER_PATH": home, "LLM_LOAD_PLUGINS": "", "OPENAI_API_KEY": KEY}
        Path(home, "extra-openai-models.yaml").write_text(
            f"- model_id: local\n  model_name: {model}\n  api_base: {url}\n"
            "  api_key_name: local\n  supports_schema: true\n"
        )
        Path(home, "keys.json").write_text(json.dumps({"local": KEY}))

        def llm(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [str(Path(sys.executable).with_name("llm")), *arguments],
                capture_output=True,
                text=True,
                env=environment,
            )

        said = llm("-m", "local", "-o", "temperature", "0", "-o", "max_tokens", "40", QUESTION)
        check("llm", "chat, streamed", "Oslo" in said.stdout, said.stdout or said.stderr)
        whole = llm("-m", "local", "--no-stream", "-o", "temperature", "0", "-o", "max_tokens", "40", QUESTION)
        check("llm", "the same without a stream", whole.returncode == 0 and whole.stdout == said.stdout, whole.stdout)
        schema = llm("-m", "local", "--schema", json.dumps(SCHEMA), "-o", "max_tokens", "60", "A city, and its people.")
        check("llm", "JSON schema", schema.returncode == 0 and fits(schema.stdout), schema.stdout or schema.stderr)
        wrong = llm("-m", "local", "--key", "wrong", QUESTION)
        check("llm", "a wrong key", wrong.returncode == 1 and "not known" in wrong.stderr, wrong.stderr)
        system = llm(
            "-m", "local", "-s", "Answer in one word.", "-o", "stop", "Oslo", "-o", "max_tokens", "40", QUESTION
        )
        stopped = system.returncode == 0 and "Oslo" not in system.stdout
        check("llm", "stop and a system message", stopped, system.stdout or system.stderr)


def main() -> int:
    artifact, *programs = sys.argv[1:]
    with serving(sys.executable, artifact) as (url, model):
        try_openai(url, model)
        try_document(url, model)
        try_langchain(url, model)
        try_llm(url, model)
        try_required(url, model)
        if programs:
            try_lm_eval(programs[1], url, model, artifact)
    with tempfile.TemporaryDirectory() as folder:
        try_scripted(Path(folder), check, KEY, programs[0] if programs else None)
    return 1 if _wrong else 0


if __name__ == "__main__":
    sys.exit(main())
