"""Batch jobs: documents, questions, what survives a kill. Without Ray, on the scripted engine."""

import json
import os
import stat
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_artifacts import make_manifest
from scripted_cli import command, make_artifact
from scripted_models import ANSWER_MARKER, END_OF_TURN, make_base_model, make_model, make_tokenizer
from tiny_models import VOCABULARY

import normistral.batch.job
import normistral.batch.journal
import normistral.batch.run
from normistral.artifact.chat_template import ChatTemplate
from normistral.batch.documents import Row, check_instruction, fill, find_prompt, index_documents, read_document
from normistral.batch.job import (
    MOST_BEGINNINGS,
    BatchJob,
    ContinuousAnswerer,
    SequentialAnswerer,
    WorkerEngine,
    Workers,
    answer_part,
    cut_parts,
)
from normistral.batch.journal import (
    PartJournal,
    begin_run,
    find_answers,
    join_answers,
    open_journal,
    parts_folder,
)
from normistral.batch.run import run_batch
from normistral.errors import EngineError, NormistralError, UsageError
from normistral.progress import NoProgress
from normistral.ray_runtime import cpu_settings, threads_per_model
from normistral.runtime.chunks import Chunk, Timings
from normistral.runtime.structured.structure import Structure
from normistral.server.backends.base import JobUpdate
from normistral.server.model_handler import ModelHandler

USER_MARKER = "<|im_start|> user\n"


def write_lines(path, *documents):
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), "utf-8")
    return path


def identity(artifact, instruction, options=None):
    job = BatchJob(artifact, artifact, artifact, "", instruction, None, options or {})
    return normistral.batch.run._identity(job, "0", WorkerEngine())


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last(tokens: list[int], marker: list[int]) -> int:
    """Where the last `marker` ends; 0 if there is none."""
    return next((i for i in range(len(tokens), 0, -1) if tokens[i - len(marker) : i] == marker), 0)


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """A model that repeats what it was told, behind every artifact; counts the answers that it was asked for."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    answer, user = (tokenizer.encode(text, add_special_tokens=False) for text in (ANSWER_MARKER, USER_MARKER))

    def next_logits(token_ids):
        logits = np.zeros(VOCABULARY, np.float32)
        start = last(token_ids, answer)
        if not start:  # in the midst of the prompt
            return logits
        question = token_ids[last(token_ids[:start], user) : start]
        question = question[: question.index(END_OF_TURN)]
        said = len(token_ids) - start
        logits[question[said] if said < len(question) else END_OF_TURN] = 10
        return logits

    asked = []

    def load(folder, **engine):
        model = make_model(tmp_path / "tokenizer", next_logits)
        chat = model.chat

        def watched(**how):
            watched_chat = chat(**how)
            send = watched_chat.send

            def sent(message, **options):
                asked.append(message)
                return send(message, **options)

            watched_chat.send = sent
            return watched_chat

        model.chat = watched
        return model

    monkeypatch.setattr(normistral.batch.job, "load", load)
    return asked


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "artifact", format="onnx", context_length=400)


# documents


def test_rows_are_numbered_by_their_lines(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"text": "en"}\r\n\n  \n{"text": "\xc3\xa5"}\n{"text": "sist"}')
    rows = index_documents(source).rows
    assert [row.number for row in rows] == [1, 4, 5]
    assert [read_document(source, row)["text"] for row in rows] == ["en", "å", "sist"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take names in UTF-8 only")
def test_a_text_whose_name_is_not_utf8_is_named(tmp_path):
    (tmp_path / os.fsdecode(b"bl\xe5b\xe6r.txt")).touch()
    with pytest.raises(UsageError, match="not UTF-8") as error:
        index_documents(tmp_path)
    assert error.value.hint == "rename it"
    assert str(error.value).isprintable()


def test_texts_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (("b/2.txt", "to"), ("a.md", "en"), ("b/bilde.png", "nei"), ("c.TXT", "tre")):
        (tmp_path / name).write_text(text, "utf-8")
    rows = index_documents(tmp_path).rows
    found = [read_document(tmp_path, row) for row in rows]
    assert found == [{"id": "a.md", "text": "en"}, {"id": "b/2.txt", "text": "to"}, {"id": "c.TXT", "text": "tre"}]


def test_the_hash_knows_a_text_from_its_name(tmp_path):
    hashes = set()
    for folder, files in {"x": {"a.txt": "bc"}, "y": {"a.txt": "b", "c.txt": ""}, "z": {"b.txt": "bc"}}.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        hashes.add(index_documents(tmp_path / folder).sha256)
    assert len(hashes) == 3


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_no_documents_are_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UsageError, match=r"in\.jsonl"):
        index_documents(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b'"text"', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100_000, b"nan", b"\x00"]
)
def test_a_bad_line_is_that_rows_error(tmp_path, line):
    source = tmp_path / "in.jsonl"
    source.write_bytes(line + b"\n")
    with pytest.raises(UsageError, match=r"the line is no(t UTF-8|\ JSON)"):
        read_document(source, Row(1, 0))


def test_a_text_that_is_gone_or_no_utf8_is_that_rows_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"bl\xe5b\xe6r")
    with pytest.raises(UsageError, match="not UTF-8: byte 0xe5 at position 2"):
        read_document(tmp_path, Row(1, "a.txt"))
    with pytest.raises(UsageError, match="cannot read"):
        read_document(tmp_path, Row(2, "b.txt"))


# questions


def test_an_instruction_takes_fields_and_leaves_other_braces():
    assert fill('{title} {{"a": 1}} { } {n}: {text}', {"title": "Brev", "text": "{n}", "n": 2}) == (
        'Brev {{"a": 1}} { } 2: {n}'
    )


@pytest.mark.parametrize("document", [{}, {"text": None}, {"text": ["a"]}, {"text": True}])
def test_a_field_that_is_missing_or_no_text_is_an_error(document):
    with pytest.raises(UsageError, match="has no text 'text'") as error:
        fill("{text}", document)
    assert error.value.hint == ("what it has there is neither a text nor a number" if document else "it has: ")


def test_an_instruction_without_a_field_is_refused():
    with pytest.raises(UsageError, match="no field"):
        check_instruction("Oppsummer {}")


def test_without_an_instruction_the_document_asks():
    conversation = [{"role": "user", "content": "hei"}]
    assert find_prompt({"prompt": "hei"}, None) == "hei"
    assert find_prompt({"messages": conversation}, None) == conversation


@pytest.mark.parametrize(
    "document",
    [
        {"text": "hei"},
        {"prompt": "a", "messages": []},
        {"prompt": 1},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "hei"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user"}]},
        {"messages": "hei"},
    ],
)
def test_a_document_that_asks_nothing_is_an_error(document):
    with pytest.raises(UsageError):
        find_prompt(document, None)


# the journal


@pytest.fixture
def run(tmp_path):
    """The name of a run, with its journal in `tmp_path`."""
    return begin_run(tmp_path)


def answer(number, **more):
    return {"row": number, "text": "svar", "finish_reason": "stop"} | more


def test_a_torn_line_counts_as_not_written(tmp_path, run):
    with PartJournal(tmp_path, run, 0) as journal:
        journal.begin(1)
        journal.finish(answer(1))
        journal.finish(answer(2, text="æøå"))
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        answers = whole[:cut].count(b"\n") - 1  # the first line only says that something was begun
        assert len(find_answers(tmp_path)[0]) == max(0, answers)
    file.write_bytes(whole + b"\0" * 100 + b"\n")
    assert set(find_answers(tmp_path)[0]) == {1, 2}


def test_who_takes_up_a_part_sees_what_was_done_in_this_run(tmp_path, run):
    for _ in range(2):
        with PartJournal(tmp_path, run, 3) as journal:
            journal.begin(7)
            journal.begin(8)
            journal.finish(answer(8))
    with PartJournal(tmp_path, run, 3) as journal, PartJournal(tmp_path, run, 4) as other:
        assert journal.answered == {8}
        assert journal.begun == {7: 2, 8: 2}
        assert not other.answered
    with PartJournal(tmp_path, begin_run(tmp_path), 3) as later:
        assert not later.answered


def test_a_worker_of_an_earlier_start_writes_no_more(tmp_path, run):
    with PartJournal(tmp_path, run, 0) as journal:
        journal.begin(1)
        begin_run(tmp_path)
        for late in (lambda: journal.finish(answer(1)), lambda: journal.begin(2)):
            with pytest.raises(NormistralError, match="started anew"):
                late()
    assert find_answers(tmp_path) == ({}, {})


def test_answers_are_joined_in_the_order_of_the_rows_and_are_private(tmp_path, run, monkeypatch):
    monkeypatch.setattr("normistral.batch.journal._MOST_OPEN", 2)
    for part in range(5):
        with PartJournal(tmp_path, run, part) as journal:
            for number in range(5):
                journal.finish(answer(5 * number + part))
    places, _ = find_answers(tmp_path)
    output = tmp_path / "out.jsonl"
    join_answers((places[number] for number in range(25)), output)
    assert [line["row"] for line in read_lines(output)] == list(range(25))
    assert stat.S_IMODE(output.stat().st_mode) == 0o600


def test_a_row_that_two_workers_answered_comes_once(tmp_path, run):
    for part, text in enumerate(("first", "second")):
        with PartJournal(tmp_path, run, part) as journal:
            journal.finish(answer(1, text=text))
    places, lines = find_answers(tmp_path)
    assert len(places) == len(lines) == 1


def test_only_one_job_writes_an_output(tmp_path):
    output = tmp_path / "out.jsonl"
    with open_journal(output, {"a": 1}), pytest.raises(UsageError, match="another job is writing"):
        open_journal(output, {"a": 1}).__enter__()
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl.parts"}


@pytest.mark.parametrize("content", [b'{"a":2}', b"{", b"[]"])
def test_what_another_job_left_is_refused(tmp_path, content):
    output = tmp_path / "out.jsonl"
    with open_journal(output, {"a": 1}) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "job.json").write_bytes(content)
    with pytest.raises(UsageError, match="another job has done: it differs in a"):
        open_journal(output, {"a": 1}).__enter__()


# parts and cores


@given(st.integers(1, 3000), st.integers(1, 9), st.booleans())
def test_every_row_is_in_one_part_and_no_worker_gets_too_much(count, workers, together):
    parts = cut_parts([Row(number, 0) for number in range(count)], workers, together=together)
    assert [row.number for part in parts for row in part.rows] == list(range(count))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert max(len(part.rows) for part in parts) <= max(1, count // workers // (4 if together else 16))


def test_models_share_the_cores_and_never_more():
    assert [threads_per_model(8, models) for models in (1, 2, 3, 8)] == [8, 4, 2, 1]
    with pytest.raises(UsageError, match="3 models cannot share 2 cores"):
        threads_per_model(2, 3)
    openvino = cpu_settings("openvino", "CPU", 2, {})
    assert openvino == {"INFERENCE_NUM_THREADS": "2", "ENABLE_CPU_PINNING": "NO"}
    assert cpu_settings("onnx", "CPU", 2, {"a": "b"}) == {"intra_op_num_threads": "2", "a": "b"}
    assert cpu_settings("onnx", "CPU", 2, {"intra_op_num_threads": "1"}) == {"intra_op_num_threads": "1"}
    assert cpu_settings("onnx", "CUDA", 2, {}) == {}


# the job


def test_answers_come_in_order_with_ids_and_errors_in_their_place(tmp_path, artifact, echo):
    source = write_lines(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "blåbær"},
        {"id": ["x", 2], "text": "nothing asked"},
        {"prompt": "x" * 500},
        {
            "messages": [
                {"role": "user", "content": "1"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "3"},
            ]
        },
    )
    output = tmp_path / "out.jsonl"
    summary = run_batch(artifact, source, output)
    first, second, third, fourth = read_lines(output)
    assert first["text"] == "blåbær"
    assert list(first) == ["row", "id", "text", "finish_reason", "prompt_tokens", "new_tokens"]
    assert second == {
        "row": 2,
        "id": ["x", 2],
        "error": {
            "type": "UsageError",
            "message": 'the document has neither of "prompt" and "messages"',
            "hint": "give one, or an --instruction",
        },
    }
    assert third["error"]["type"] == "ContextLengthError"
    assert fourth["text"] == "3"
    assert (summary.rows, summary.failed, summary.found, summary.cut_off) == (4, 2, 0, 0)
    assert summary.new_tokens == first["new_tokens"] + fourth["new_tokens"]
    assert {path.name for path in tmp_path.iterdir()} >= {"out.jsonl"}
    assert not parts_folder(output).exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_instruction_and_a_system_message_are_put_to_every_document(tmp_path, artifact, echo):
    source = write_lines(tmp_path / "in.jsonl", {"text": "a"}, {"text": "b"})
    run_batch(artifact, source, tmp_path / "out.jsonl", instruction="<{text}>", system="Vær kort.")
    assert [line["text"] for line in read_lines(tmp_path / "out.jsonl")] == ["<a>", "<b>"]


def test_what_is_cut_off_is_counted(tmp_path, artifact, echo):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "lang"}, {"prompt": "k"})
    summary = run_batch(artifact, source, tmp_path / "out.jsonl", max_new_tokens=3)
    assert summary.cut_off == 1
    assert read_lines(tmp_path / "out.jsonl")[0]["finish_reason"] == "length"


def test_a_job_that_was_stopped_goes_on_and_repeats_nothing(tmp_path, artifact, echo):
    source = write_lines(tmp_path / "in.jsonl", *({"prompt": f"nummer {n}"} for n in range(1, 9)))
    output = tmp_path / "out.jsonl"

    class Stops(NoProgress):
        @contextmanager
        def stage(self, title, total=None, unit=""):
            yield self
            self.left = 3

        def advance(self, amount):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(artifact, source, output, progress=Stops())
    assert not output.exists()
    assert echo == ["nummer 1", "nummer 2", "nummer 3"]
    summary = run_batch(artifact, source, output)
    assert summary.found == 3
    assert echo == [f"nummer {n}" for n in range(1, 9)]
    assert [line["text"] for line in read_lines(output)] == echo


def test_another_question_is_another_job(tmp_path, artifact, echo):
    source = write_lines(tmp_path / "in.jsonl", {"text": "a"})
    output = tmp_path / "out.jsonl"
    with open_journal(output, identity(artifact, "{text}")):
        pass
    with pytest.raises(UsageError, match="differs in documents, instruction"):
        run_batch(artifact, source, output, instruction="Hva er {text}?")


def test_a_row_that_takes_its_worker_down_is_given_up(tmp_path, artifact, echo):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "farlig"}, {"prompt": "snill"})
    (part,) = cut_parts(index_documents(source).rows, 1, together=False)[:1]
    folder = tmp_path / "journal"
    folder.mkdir()
    job = BatchJob(artifact, source, folder, begin_run(folder))
    for _ in range(MOST_BEGINNINGS):
        with PartJournal(folder, job.run, part.number) as journal:
            journal.begin(1)  # and then it died
    list(answer_part(SequentialAnswerer(job, WorkerEngine()), job, part))
    _, lines = find_answers(folder)
    assert lines[1].error["message"] == "3 workers ended while they answered this row"
    assert echo == []


def test_a_base_model_completes_prompts(tmp_path, monkeypatch):
    artifact = make_artifact(tmp_path / "artifact", format="onnx", role="base", template=None)
    monkeypatch.setattr(
        normistral.batch.job,
        "load",
        lambda folder, **engine: make_base_model(tmp_path / "t", [" Oslo."], after="er"),
    )
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "Byen er"}, {"messages": [{"role": "user", "content": "a"}]})
    run_batch(artifact, source, tmp_path / "out.jsonl")
    first, second = read_lines(tmp_path / "out.jsonl")
    assert first["text"] == " Oslo."
    assert "knows no conversation" in second["error"]["message"]


def test_with_a_seed_the_answers_are_the_same_together_and_one_by_one(tmp_path, tiny_fp16, monkeypatch):
    together = []
    opened = normistral.batch.run.open_answerer

    def note(job, engine):
        answerer = opened(job, engine)
        together.append(isinstance(answerer, ContinuousAnswerer))
        return answerer

    monkeypatch.setattr(normistral.batch.run, "open_answerer", note)
    prompts = ["Oslo", "a b c d e f g h i j", "tre", "Oslo", "han", "x " * 12, "fire", "b"]
    source = write_lines(tmp_path / "in.jsonl", *({"prompt": text} for text in prompts))
    options = {"seed": 11, "temperature": 2.0, "max_new_tokens": 12, "ignore_eos": True}
    written = {}
    for batching in ("auto", "off"):
        output = tmp_path / f"{batching}.jsonl"
        run_batch(tiny_fp16, source, output, engine=WorkerEngine(batching=batching), **options)
        written[batching] = read_lines(output)
    assert together == [True, False]
    assert written["auto"] == written["off"]
    assert len({line["text"] for line in written["auto"]}) > 4
    run_batch(tiny_fp16, source, tmp_path / "other.jsonl", **options | {"seed": 12})
    assert read_lines(tmp_path / "other.jsonl") != written["auto"]


def test_with_a_seed_a_job_goes_on_together_or_one_by_one(tmp_path):
    artifact = make_artifact(tmp_path / "artifact")

    def identity_of(batching, **options):
        job = BatchJob(artifact, tmp_path, tmp_path, "", options=options)
        return normistral.batch.run._identity(job, "0", WorkerEngine(batching=batching))

    assert identity_of("auto", seed=3) == identity_of("off", seed=3)
    assert identity_of("auto", seed=-1) != identity_of("off", seed=-1)  # no seed
    assert identity_of("auto") != identity_of("off")


class Juggler:
    """A batch that ends its jobs from the last to the first, and says what it was told."""

    def __init__(self, tokenizer):
        self._tokenizer, self._jobs, self.most = tokenizer, {}, 0

    def add(self, job):
        if "refuse" in self._tokenizer.decode(job.prompt_ids):
            raise UsageError("no", "never")
        self._jobs[job.job_id] = job
        self.most = max(self.most, len(self._jobs))

    def step(self):
        if not self._jobs:
            return []
        job_id, job = self._jobs.popitem()
        said = self._tokenizer.decode(job.prompt_ids)
        if "break" in said:
            return [JobUpdate(job_id, (EngineError if "engine" in said else NormistralError)("broken"))]
        timings = Timings(len(job.prompt_ids), 0, 0.1, 0.1, 2, 0.1)
        return [
            JobUpdate(job_id, Chunk(f"{job.tenant}: ", 1, None, (), None, timings)),
            JobUpdate(job_id, Chunk(said, None, None, (), "stop", timings)),
        ]


def test_rows_computed_together_keep_their_answers_apart(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", role="base", template=None)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    prompts = [f"tekst {number}" for number in range(9)]
    prompts[3], prompts[5], prompts[7] = "refuse", "break", "x" * 5000
    source = write_lines(tmp_path / "in.jsonl", *({"id": n, "prompt": text} for n, text in enumerate(prompts)))
    job = BatchJob(artifact, source, tmp_path, begin_run(tmp_path))
    handler = ModelHandler("tiny", artifact, make_manifest(context_length=400), tokenizer, 400, 399, load=None)
    batch, begun = Juggler(tokenizer), []
    lines = list(
        ContinuousAnswerer(job, batch, handler, slots=3).answer_all(index_documents(source).rows, begun.append)
    )
    assert begun == list(range(1, 10))
    assert batch.most == 3
    assert sorted(line["row"] for line in lines) == begun
    assert [line["row"] for line in lines] != begun
    by_id = {line["id"]: line for line in lines}
    for number in (0, 1, 2, 4, 6, 8):
        assert by_id[number]["text"] == f"batch: {prompts[number]}"
        assert by_id[number]["finish_reason"] == "stop"
    assert [by_id[number]["error"]["type"] for number in (3, 5, 7)] == [
        "UsageError",
        "NormistralError",
        "ContextLengthError",
    ]
    write_lines(source, {"prompt": "break the engine"}, {"prompt": "en"})
    answers = ContinuousAnswerer(job, batch, handler, slots=3).answer_all(index_documents(source).rows, begun.append)
    assert next(answers)["row"] == 2
    with pytest.raises(EngineError):
        next(answers)


def test_an_engine_that_failed_ends_the_job_and_loses_no_answer(tmp_path, artifact, echo, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "en"}, {"prompt": "to"}, {"prompt": "tre"})
    output = tmp_path / "out.jsonl"
    complete = SequentialAnswerer._complete

    def fails(self, document):
        if document["prompt"] == "to":
            raise EngineError("out of memory")
        return complete(self, document)

    with monkeypatch.context() as patched:
        patched.setattr(SequentialAnswerer, "_complete", fails)
        with pytest.raises(EngineError):
            run_batch(artifact, source, output)
    assert run_batch(artifact, source, output).found == 1
    assert echo == ["en", "to", "tre"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instruction": "Oppsummer"}, "no field"),
        ({"workers": Workers(threads=2)}, "without --workers there is no Ray"),
        ({"workers": Workers(address="auto")}, "without --workers there is no Ray"),
        ({"workers": Workers(count=0)}, "cannot be 0 workers"),
        ({"workers": Workers(count=1, threads=0)}, "cannot have 0 threads"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"nonsense": 1}, "unknown option nonsense"),
        ({"max_reasoning_tokens": 5}, "means nothing here"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, artifact, options, message):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    before = set(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        run_batch(artifact, source, tmp_path / "out.jsonl", **options)
    assert set(tmp_path.iterdir()) == before


def test_an_output_is_never_one_of_the_documents(tmp_path, artifact, echo):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("tekst")
    (tmp_path / "link").symlink_to(tmp_path / "texts")
    texts, link = tmp_path / "texts", tmp_path / "link"
    for documents, output in (
        (source, source),
        (texts, texts / "a.txt"),
        (link, texts / "a.txt"),
        (texts, link / "a.txt"),
    ):
        before = output.read_bytes()
        with pytest.raises(UsageError, match="would be one of the documents"):
            run_batch(artifact, documents, output, instruction="{text}", force=True)
        assert output.read_bytes() == before
    assert echo == []


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_is_named_and_the_job_goes_on_later(tmp_path, artifact, echo, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "en"}, {"prompt": "to"})

    with monkeypatch.context() as patch:  # the buffered line is written again when the file is closed
        full = SimpleNamespace(mkstemp=lambda **_: (os.open("/dev/full", os.O_WRONLY), ""))
        patch.setattr(normistral.batch.journal, "tempfile", full)
        with pytest.raises(NormistralError, match=r"cannot write in .*out\.jsonl\.parts: the disk is full"):
            run_batch(artifact, source, tmp_path / "out.jsonl")
    run_batch(artifact, source, tmp_path / "out.jsonl")
    assert [line["text"] for line in read_lines(tmp_path / "out.jsonl")] == ["en", "to"]


def test_an_output_that_is_there_is_replaced_only_by_force(tmp_path, artifact, echo):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "ny"})
    output = tmp_path / "out.jsonl"
    output.write_text("gammel")
    with pytest.raises(UsageError, match="exists already"):
        run_batch(artifact, source, output)
    assert output.read_text() == "gammel"
    run_batch(artifact, source, output, force=True)
    assert read_lines(output)[0]["text"] == "ny"


def test_a_document_that_changes_while_the_job_runs_is_not_answered(tmp_path):
    """The second of three becomes another, in a file and in a folder."""
    lines = write_lines(tmp_path / "in.jsonl", *({"prompt": text} for text in ("en", "to", "tre")))
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (texts / name).write_text("tekst")
    for source in (lines, texts):
        rows = index_documents(source).rows
        if source is texts:
            (texts / "b.txt").write_text("TEKST")
        else:
            lines.write_text(lines.read_text().replace("to", "ny"))  # as long as before
        read_document(source, rows[0])
        with pytest.raises(UsageError, match="was changed while the job ran"):
            read_document(source, rows[1])


def test_an_output_that_comes_while_the_job_runs_is_kept(tmp_path, artifact, echo, monkeypatch):
    source, output = write_lines(tmp_path / "in.jsonl", {"prompt": "ny"}), tmp_path / "out.jsonl"
    answer = normistral.batch.run._answer

    def other_job_writes(*arguments):
        answer(*arguments)
        output.write_text("en annens")

    with monkeypatch.context() as patched:
        patched.setattr(normistral.batch.run, "_answer", other_job_writes)
        with pytest.raises(UsageError, match="exists already"):
            run_batch(artifact, source, output)
    assert output.read_text() == "en annens"
    output.unlink()
    assert run_batch(artifact, source, output).found == 1  # what was answered is kept
    assert echo == ["ny"]


def test_without_ray_the_error_names_the_extra(tmp_path, artifact, monkeypatch):
    import sys

    from normistral.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "ny"})
    with pytest.raises(MissingExtraError) as error:
        run_batch(artifact, source, tmp_path / "out.jsonl", workers=Workers(count=1))
    assert error.value.hint == 'pip install "normistral[ray]"'


# the command line


def test_the_command_writes_the_answers_and_tells_what_became_of_them(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", format="onnx")
    source = write_lines(tmp_path / "in.jsonl", {"id": 7, "text": "Kjære Åse"}, {"id": 8})
    output = tmp_path / "ut.jsonl"
    arguments = ["batch", str(artifact), str(source), str(output), "--instruction", "Svar på {text}", "--json"]
    done = subprocess.run(command(tmp_path, *arguments, answers=["Blåbær."]), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 2
    assert "documents have no answer" in done.stderr.decode()
    assert "Kjære" not in done.stderr.decode()
    first, second = read_lines(output)
    assert (first["id"], first["text"]) == (7, "Blåbær.")
    assert second["error"]["message"] == "the document has no text 'text'"


def test_a_structure_belongs_to_the_job_and_holds_for_every_answer(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", format="onnx")
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "Ja eller nei?"}, {"prompt": "Og nå?"})
    output = tmp_path / "ut.jsonl"
    arguments = ["batch", str(artifact), str(source), str(output), "--choice", "ja", "--choice", "nei"]
    done = subprocess.run(command(tmp_path, *arguments, answers=["kanskje"]), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {line["text"] for line in read_lines(output)} <= {"ja", "nei"}
    asked = identity(artifact, None, {"structure": Structure.choice(["ja", "nei"])})
    with open_journal(tmp_path / "b.jsonl", asked):
        pass
    with open_journal(tmp_path / "b.jsonl", asked):  # and is the same when it is asked again
        pass


@pytest.mark.parametrize("together", [False, True])
def test_documents_longer_than_the_context(tmp_path, artifact, echo, monkeypatch, together):
    """Refused, or without their middle: the row says how many tokens, and from where."""
    text = "Snøen falt tett over fjellet. " * 40
    source = write_lines(tmp_path / "in.jsonl", {"id": 1, "text": text}, {"id": 2, "text": "Kort."})
    rows, tokenizer = index_documents(source).rows, make_tokenizer(tmp_path / "t")

    def answers(overflow):
        options = {"max_new_tokens": 9}
        job = BatchJob(artifact, source, tmp_path, "run", "{text}\nHva falt?", None, options, overflow)
        if together:
            handler = ModelHandler("tiny", artifact, make_manifest(context_length=400), tokenizer, 400, 399, load=None)
            handler = replace(handler, template=ChatTemplate(make_manifest().template, tokenizer))
            answerer = ContinuousAnswerer(job, Juggler(tokenizer), handler, slots=3)
        else:
            answerer = SequentialAnswerer(job, WorkerEngine())
        return {line["id"]: line for line in answerer.answer_all(rows, lambda row: None)}

    refused = answers("error")
    assert refused[1]["error"]["type"] == "ContextLengthError"
    cut = answers("cut-middle")
    (place,) = cut[1]["left_out"]["cuts"]
    assert place["message"] == 0
    assert 0 < place["start"] < place["end"] < len(text)
    assert cut[1]["prompt_tokens"] < 400 < cut[1]["prompt_tokens"] + cut[1]["left_out"]["tokens"]
    assert "left_out" not in cut[2]


def test_a_policy_is_part_of_what_a_job_asks_for(tmp_path, artifact, echo):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "Snø " * 200})
    summary = run_batch(artifact, source, tmp_path / "out.jsonl", overflow="cut-middle", max_new_tokens=9)
    assert summary.failed == 0
    with pytest.raises(UsageError, match="no policy"):
        run_batch(artifact, source, tmp_path / "b.jsonl", overflow="forget")
