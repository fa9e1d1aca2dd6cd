"""The programs in examples/ do what they say: on the demo model, or on scripted ones where that shows more."""

import importlib.util
import json
import re
import stat
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from scripted_models import make_model

import normistral
from normistral.artifact.manifest import read_manifest
from normistral.errors import ResourceError

EXAMPLES = Path(__file__).parents[2] / "examples"
LIBRARY, REPORTS = EXAMPLES / "texts/library.txt", EXAMPLES / "texts/reports.jsonl"


def load_example(name: str, monkeypatch: pytest.MonkeyPatch):
    """The module; under its own name too, because other processes import from it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_in_the_readme_and_its_command_is_its_own():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in readme
        assert f"python examples/{path.name} ARTIFACT" in path.read_text(encoding="utf-8")
    for named in re.findall(r"examples/[\w/.]+\w", readme):
        assert (EXAMPLES.parent / named).exists(), named


# A document


@pytest.fixture
def asking(monkeypatch):
    return load_example("ask_document", monkeypatch)


def test_a_document_is_read_once_and_kept(asking, demo_int4, tmp_path, capsys):
    session = tmp_path / "library.session"
    arguments = [str(demo_int4), str(LIBRARY), "--english", "--session", str(session)]
    asking.main([*arguments, "When is the library closed?"])
    first = capsys.readouterr().out
    assert "Sunday" in first
    asking.main([*arguments, "When is the library closed?"])
    restored = capsys.readouterr()
    assert restored.err.startswith("library.txt was restored in ")
    answer = first.splitlines()[:2]
    assert restored.out.splitlines()[:2] == answer
    reused, computed = map(int, re.findall(r"(\d+) tokens reused, (\d+) computed", restored.out)[0])
    assert reused > 150
    assert computed < 20


def test_a_changed_document_is_read_anew(asking, tmp_path, capsys):
    model = make_model(tmp_path / "model", ["svar"], context_length=1000)
    document, session = tmp_path / "a.txt", tmp_path / "a.session"
    document.write_text("Skolen står ferdig i 2029.", encoding="utf-8")
    asking.read_document(model, document, session)
    document.write_text("Skolen står ferdig i 2031.", encoding="utf-8")
    assert asking.read_document(model, document, session).prompt == "Skolen står ferdig i 2031."
    assert "a.session is made anew: the document has changed" in capsys.readouterr().err
    session.write_bytes(session.read_bytes()[:-1])
    asking.read_document(model, document, session)
    assert "a.session is made anew: " in capsys.readouterr().err
    assert asking.read_document(model, document, session).prompt == "Skolen står ferdig i 2031."
    assert capsys.readouterr().err.startswith("a.txt was restored")


@pytest.fixture
def service(asking, tmp_path):
    model = make_model(tmp_path / "model", [" I 2029.\nOg mer"], after="\nSvar:", context_length=1000)
    with asking.make_server(model.prefill("Skolen står ferdig i 2029."), asking.FORM, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_service_answers_a_question(service):
    with urllib.request.urlopen(service, "Når er skolen ferdig på Åsen?".encode()) as response:
        assert response.read() == b"I 2029.\n"


@pytest.mark.parametrize(("question", "status"), [(b"x" * 20_000, 413), (b"", 400), (b"\xff", 400), (b"x" * 1500, 400)])
def test_the_service_refuses_what_it_cannot_answer(service, question, status):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(service, question)
    assert refused.value.code == status
    refused.value.close()


# Extraction


@pytest.fixture
def extraction(monkeypatch):
    return load_example("extract_to_json", monkeypatch)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_facts_of_the_demo_model_fit_the_schema(extraction, demo_int4, tmp_path):
    import jsonschema

    texts, output = tmp_path / "texts.jsonl", tmp_path / "facts.jsonl"
    texts.write_text(REPORTS.read_text(encoding="utf-8").splitlines()[2], encoding="utf-8")
    extraction.main([str(demo_int4), str(texts), str(output)])
    (found,) = read_lines(output)
    assert (found["id"], found["complete"]) == ("2026-0414", True)
    jsonschema.validate(found["facts"], extraction.SCHEMA)
    assert stat.S_IMODE(output.stat().st_mode) == 0o600


def test_what_is_done_is_kept_and_what_was_cut_off_is_tried_again(extraction, tmp_path, monkeypatch, capsys):
    facts = {"topic": "roads", "place": "Åsen", "urgent": True, "summary": "Et hull."}
    script = [json.dumps(facts, ensure_ascii=False)]
    options = {"context_length": 2000}
    monkeypatch.setattr("normistral.load", lambda name: make_model(tmp_path / "model", script, **options))
    output = tmp_path / "facts.jsonl"
    extraction.main(["model", str(REPORTS), str(output), "--max-new-tokens", "12"])
    assert capsys.readouterr().err == "4 written, 4 of them cut off; 0 were done before\n"
    assert read_lines(output)[0] == {"id": "2026-0412", "complete": False, "cut_off": '{"topic": "r'}

    extraction.main(["model", str(REPORTS), str(output)])
    assert capsys.readouterr().err == "4 written, 0 of them cut off; 0 were done before\n"
    done = read_lines(output)
    assert [entry["id"] for entry in done] == ["2026-0412", "2026-0413", "2026-0414", "2026-0415"]
    assert all(entry["facts"] == facts for entry in done)

    whole = output.read_bytes()
    output.write_bytes(whole[:-30])  # killed while it wrote the last line
    extraction.main(["model", str(REPORTS), str(output)])
    assert capsys.readouterr().err == "1 written, 0 of them cut off; 3 were done before\n"
    assert output.read_bytes() == whole


def test_a_line_that_is_no_text_is_named(extraction, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"id": 1, "text": "a"}\n\n{"id": 2}\n', encoding="utf-8")
    found = extraction.read_texts(texts)
    assert next(found) == ("1", "a")
    with pytest.raises(SystemExit, match=r"line 3 of texts\.jsonl"):
        next(found)


# A chat in a window


@pytest.fixture
def desktop(monkeypatch):
    pytest.importorskip("tkinter")
    return load_example("desktop_chat", monkeypatch)


@pytest.fixture
def converse(desktop, tmp_path):
    """Starts a conversation with a scripted model, and ends it."""
    started = []

    def start(*script, wait_for=None, **changes):
        model = make_model(tmp_path / "model", list(script), **changes)
        if wait_for is not None:
            next_logits = model._backend.next_logits
            model._backend.next_logits = lambda token_ids: wait_for.wait(20) and next_logits(token_ids)
        started.append(desktop.Conversation(lambda: model))
        assert next_event(started[-1]) == desktop.Event("ready", "scripted")
        return started[-1]

    yield start
    for conversation in started:
        conversation.close()
        assert conversation.wait(20)


def next_event(conversation):
    return conversation.events.get(timeout=20)


def rest_of_answer(conversation):
    text = ""
    while (event := next_event(conversation)).kind == "text":
        text += event.text
    return text, event


def test_an_answer_comes_in_pieces_from_the_worker(desktop, converse):
    conversation = converse("Blåbær.", "Og mer.")
    conversation.send("Hva?")
    assert rest_of_answer(conversation) == ("Blåbær.", desktop.Event("done", "stop"))
    conversation.send("Mer?")
    assert rest_of_answer(conversation)[0] == "Og mer."


def test_cancel_stops_and_the_conversation_goes_on(desktop, converse):
    gate = threading.Event()
    conversation = converse("a" * 200, "b", wait_for=gate)
    conversation.send("Hva?")
    conversation.cancel()  # before there is a token
    gate.set()
    text, end = rest_of_answer(conversation)
    assert len(text) < 3
    assert end == desktop.Event("done", "cancelled")
    conversation.send("Mer?")
    assert rest_of_answer(conversation) == ("b", desktop.Event("done", "stop"))


def test_closing_ends_a_running_answer(converse):
    gate = threading.Event()
    conversation = converse("a" * 200, wait_for=gate)
    conversation.send("Hva?")
    conversation.close()
    gate.set()
    assert conversation.wait(20)


def test_what_does_not_fit_is_an_event_and_not_the_end(desktop, converse):
    conversation = converse("svar")
    conversation.send("x" * 500)
    event = next_event(conversation)
    assert event.kind == "error"
    assert "has room for 400" in event.text
    conversation.send("Hva?")
    assert rest_of_answer(conversation)[0] == "svar"


def test_a_model_that_cannot_be_loaded_is_told(desktop, tmp_path):
    conversation = desktop.Conversation(lambda: normistral.load(tmp_path / "nothing"))
    assert next_event(conversation).kind == "error"
    assert conversation.wait(20)


def test_the_window_shows_the_conversation(desktop, converse):
    tk = pytest.importorskip("tkinter")
    try:
        root = tk.Tk()
    except tk.TclError:
        pytest.skip("there is no screen")
    conversation = converse("Blåbær.")
    window = desktop.Window(root, conversation)
    window.button.configure(state="normal")  # its "ready" was taken by `converse`
    window.message.insert(0, "Hva?")
    window.send()
    while str(window.button["text"]) == "Stop":
        root.update()
    assert window.transcript.get("1.0", "end").split("\n")[1:3] == ["Hva?", "Blåbær."]
    window.close()


# A memory limit


@pytest.fixture
def limited(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("RLIMIT_DATA counts what is mapped on Linux only")
    return load_example("limited_memory", monkeypatch)


def test_a_model_answers_within_its_estimate(limited, demo_int4, capsys):
    needed = limited.estimate(read_manifest(demo_int4), 24).total
    limited.main([str(demo_int4), "--limit-mib", str(needed // limited.MIB + 1), "--tokens", "24"])
    printed = capsys.readouterr().out
    assert "answer     The three largest cities of Norway are" in printed
    assert 100 < int(re.findall(r"peak +(\d+) MiB", printed)[0]) < 600


def test_a_limit_that_is_too_small_is_refused_before_anything_is_loaded(limited, demo_int4, monkeypatch):
    monkeypatch.setattr(limited, "run", None)
    with pytest.raises(ResourceError, match=r"needs about \d+ MiB; there are 200 MiB"):
        limited.main([str(demo_int4), "--limit-mib", "200"])


@pytest.mark.parametrize("limit_mib", [200, 50], ids=["the engine", "the interpreter"])
def test_what_runs_out_all_the_same_says_so(limited, demo_int4, limit_mib):
    with pytest.raises(ResourceError, match=r"could not load|failed at token|ran out of memory|ended"):
        limited.main([str(demo_int4), "--limit-mib", str(limit_mib), "--anyway"])
