"""`normistral eval` on real tiny artifacts: its figures against transformers, what it keeps, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest
import torch
from fork_server import start_forked
from tiny_models import edit_json, make_mistral
from transformers import AutoModelForCausalLM

import normistral
from normistral.artifact.tokenizer import Tokenizer
from normistral.cli import main
from normistral.evaluation.quality import ModelPredictor, interrupts_win, score
from normistral.evaluation.windows import choose_windows, cut, tokenise
from normistral.export.reference import model as reference

TEXT = "Blåbærsyltetøy på brød er godt, sa Åse. 😀 The quick brown fox jumps over the lazy dog, and that is that. " * 3
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # torch's threads wait for each other longer than they compute here
SHAPE = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "sliding_window": 16, "positions": 64}


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A checkpoint whose tokenizer begins text with a BOS, and its artifact."""
    folder = tmp_path_factory.mktemp("bos")
    make_mistral(folder / "checkpoint", adds_bos=True, **SHAPE)
    normistral.export_model(str(folder / "checkpoint"), folder / "artifact", format="onnx", weights="fp32")
    return folder / "checkpoint", folder / "artifact"


@pytest.fixture
def fp32(tiny_onnx):
    return tiny_onnx("onnx-fp32-plain")


def evaluate(capsys, artifact, *arguments):
    """The document that --json prints."""
    assert main(["eval", str(artifact), "--json", "-", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def transformers_perplexity(checkpoint, windows):
    """With transformers' own loss: the mean over a window's labels that are not -100."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    nll = 0.0
    for window in windows:
        ids = torch.tensor([window.token_ids])
        labels = ids.clone()
        labels[:, : -window.scored] = -100
        with torch.inference_mode():
            nll += float(model(ids, labels=labels).loss) * window.scored
    return np.exp(nll / sum(window.scored for window in windows))


# Figures


@pytest.mark.parametrize("convention", ["sliding", "llama.cpp"])
@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_is_transformers_own_on_the_same_windows(
    capsys, text, fp32, tiny_checkpoint, with_bos, convention, bos
):
    checkpoint, artifact = with_bos if bos else (tiny_checkpoint, fp32)
    found = evaluate(capsys, artifact, "--text", text, "--windows", convention, "--exact")
    settings = choose_windows(convention, None, None, context_length=64, bos_id=1 if bos else None)
    token_ids = list(TEXT.encode())  # a byte-level tokenizer without merges
    windows = cut(Tokenizer.from_folder(checkpoint).encode(TEXT, add_special_tokens=False), settings)
    assert found["perplexity"]["value"] == pytest.approx(transformers_perplexity(checkpoint, windows), rel=1e-5)
    assert found["text"]["tokens"] == found["text"]["bytes"] == len(token_ids)
    if convention == "sliding":
        assert found["scored_tokens"] == found["scored_bytes"] == len(token_ids) - (not bos)
        assert found["byte_perplexity"]["value"] == pytest.approx(found["perplexity"]["value"])
    else:
        assert found["scored_tokens"] == 31 * found["windows"]["count"]
    assert found["bits_per_byte"]["value"] == pytest.approx(np.log2(found["byte_perplexity"]["value"]))
    assert found["comparison"] is None


def test_the_reference_is_the_checkpoint_in_float32(capsys, text, tiny_onnx, fp32, tiny_checkpoint):
    exact = evaluate(capsys, fp32, "--text", text, "--reference", tiny_checkpoint, "--exact")
    compared = exact["comparison"]
    assert compared["kl_max"] < 1e-7  # what 16 bits leave
    assert compared["top1_agreement"]["value"] == 1.0
    assert compared["perplexity_ratio"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert compared["reference_perplexity"]["value"] == pytest.approx(exact["perplexity"]["value"], rel=1e-6)

    rounded = evaluate(capsys, tiny_onnx("onnx-int4"), "--text", text, "--reference", tiny_checkpoint, "--exact")
    assert rounded["comparison"]["reference_perplexity"] == compared["reference_perplexity"]
    assert rounded["comparison"]["kl_mean"]["value"] > 1e-3
    assert rounded["comparison"]["top1_agreement"]["value"] < 1.0


def test_kl_against_an_artifact_is_that_of_its_logits(capsys, text, tiny_onnx, fp32):
    int4 = tiny_onnx("onnx-int4")
    found = evaluate(capsys, int4, "--text", text, "--reference", fp32, "--exact")
    logits = []
    for folder in (fp32, int4):
        with normistral.load(folder, exact=True) as model:
            ours = tokenise(TEXT, model.tokenizer)
            windows = cut(ours.token_ids, choose_windows("sliding", None, None, context_length=64, bos_id=None))
            logits.append(np.concatenate(list(ModelPredictor(model).predict(windows))).astype(np.float64))
    p, q = (np.exp(values) / np.exp(values).sum(axis=1, keepdims=True) for values in logits)
    kl = (p * np.log(p / q)).sum(axis=1)
    compared = found["comparison"]
    for name, expected in {"mean": kl.mean(), "median": np.median(kl), "p99": np.quantile(kl, 0.99)}.items():
        assert compared[f"kl_{name}"]["value"] == pytest.approx(expected, rel=1e-3)
    assert compared["kl_max"] == pytest.approx(kl.max(), rel=1e-3)
    assert compared["top1_agreement"]["value"] == pytest.approx(np.mean(p.argmax(axis=1) == q.argmax(axis=1)))


def test_an_artifact_is_at_no_distance_from_itself(capsys, text, tiny_onnx):
    int4 = tiny_onnx("onnx-int4")
    compared = evaluate(capsys, int4, "--text", text, "--reference", int4, "--exact")["comparison"]
    assert compared["kl_max"] < 1e-7
    assert compared["top1_agreement"]["value"] == 1.0


def test_an_openvino_artifact_is_scored_too(capsys, text, tiny_fp16, fp32):
    found = evaluate(capsys, tiny_fp16, "--text", text, "--reference", fp32, "--exact")
    assert found["format"] == "openvino"
    assert 0 < found["comparison"]["kl_mean"]["value"] < 1e-4


def test_layer_by_layer_gives_the_same_figures(capsys, text, fp32, tiny_checkpoint, tmp_path, monkeypatch):
    files = [tmp_path / "at-once", tmp_path / "layers"]
    arguments = ["--text", text, "--reference", tiny_checkpoint, "--exact", "--reference-cache"]
    at_once = evaluate(capsys, fp32, *arguments, files[0])
    monkeypatch.setattr(reference, "_RUN_LIMIT_BYTES", 0)
    by_layers = evaluate(capsys, fp32, *arguments, files[1])
    assert by_layers["comparison"]["kl_max"] == pytest.approx(at_once["comparison"]["kl_max"], abs=1e-8)
    assert files[0].stat().st_size == files[1].stat().st_size


def test_pieces_of_a_prompt_are_put_together(tmp_path):
    """A window longer than what is fed at once; only some of the last piece, and of the one before, is scored."""
    from scripted_models import make_model

    from normistral.runtime.engines.scripted import random_logits

    logits = random_logits(261)
    with make_model(tmp_path / "tokenizer", logits) as model:  # feeds 16 tokens at once
        ids = list(range(5, 46))
        sequence = model.create_sequence()
        for last in (1, 9, 10, 25, 41):
            expected = np.stack([logits(ids[:end]) for end in range(42 - last, 42)])
            np.testing.assert_array_equal(
                np.concatenate(list(sequence.logits_of_last(ids, last, from_scratch=True))), expected
            )


def test_bytes_of_a_character_count_with_its_last_token(tmp_path):
    from scripted_models import make_tokenizer

    found = tokenise("aå😀b", make_tokenizer(tmp_path))
    assert found.nbytes.tolist() == [1, 0, 2, 0, 0, 0, 4, 1]


# What is kept


def test_the_reference_is_computed_once_and_kept_in_the_store(capsys, text, tiny_onnx, fp32, own_store, monkeypatch):
    arguments = ["--text", text, "--reference", fp32, "--exact"]
    first = evaluate(capsys, tiny_onnx("onnx-int4"), *arguments)
    (kept,) = (own_store / "cache" / "references").iterdir()
    assert kept.suffix == ".reference"
    content = kept.read_bytes()

    def never(*args):
        raise AssertionError("it was computed again")

    monkeypatch.setattr("normistral.evaluation.quality.write_reference", never)
    assert evaluate(capsys, tiny_onnx("onnx-int4"), *arguments) == first
    assert kept.read_bytes() == content


def test_max_tokens_stops_early_and_a_longer_run_goes_on(capsys, text, tiny_onnx, fp32, tmp_path):
    def run(name, *more):
        arguments = ["--text", text, "--reference", fp32, "--exact", "--reference-cache", tmp_path / name]
        return evaluate(capsys, tiny_onnx("onnx-int4"), *arguments, *more)

    whole = run("whole")
    short = run("grown", "--max-tokens", 100)
    assert (short["scored_tokens"], short["windows"]["count"]) == (63 + 32 + 32, 3)
    size = (tmp_path / "grown").stat().st_size
    assert run("grown") == whole
    assert size < (tmp_path / "grown").stat().st_size
    assert (tmp_path / "grown").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.fixture(scope="module")
def long_run(tiny_onnx, tiny_checkpoint, tmp_path_factory):
    """Hundreds of windows: seconds of work, so that there is a middle to stop in.

    Returns:
        Function of cache and JSON file -> arguments of a run; a run of them to its end.
    """
    folder = tmp_path_factory.mktemp("long")
    (folder / "long.txt").write_text(TEXT * 14, encoding="utf-8")
    given = ["eval", str(tiny_onnx("onnx-fp32-plain")), "--text", str(folder / "long.txt"), "--exact"]
    given += ["--reference", str(tiny_checkpoint)]

    def arguments(cache, document):
        return [*given, "--reference-cache", str(cache), "--json", str(document)]

    whole = folder / "whole", folder / "whole.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NORMISTRAL_HOME", str(folder / "home"))
        assert main(arguments(*whole)) == 0
    return arguments, whole


def stop_in_the_middle(arguments, cache, number):
    """Send a signal once a good part of the reference is on disk; the process's exit code and stderr."""
    command = [sys.executable, "-m", "normistral", *arguments]
    with Path(os.devnull).open("rb") as nothing, TemporaryFile() as out, TemporaryFile() as err:
        streams = [stream.fileno() for stream in (nothing, out, err)]
        process = start_forked(command, streams, cwd=cache.parent, env=os.environ | ONE_THREAD, tools=True)
        deadline = time.monotonic() + 120
        while not cache.exists() or cache.stat().st_size < 200_000:
            assert time.monotonic() < deadline
            with pytest.raises(subprocess.TimeoutExpired):  # it still runs
                process.wait(0.005)
        os.kill(process.pid, number)
        code = process.wait(60)
        stdout, stderr = (os.pread(stream.fileno(), 2**20, 0) for stream in (out, err))
    assert stdout == b""
    return code, stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on_and_gives_the_same(capsys, tmp_path, long_run, number):
    arguments, (whole, expected) = long_run
    cache, document = tmp_path / "stopped", tmp_path / "stopped.json"
    code, stderr = stop_in_the_middle(arguments(cache, document), cache, number)
    done = cache.stat().st_size
    assert done < 0.9 * whole.stat().st_size
    assert not document.exists()
    if number == signal.SIGINT:
        assert code == 130, stderr
        assert re.search(r"\d+ windows are kept in .*stopped; the same command goes on from there", stderr)
        assert "Traceback" not in stderr
    assert main(arguments(cache, document)) == 0
    assert "going on after window" in capsys.readouterr().err
    assert document.read_bytes() == expected.read_bytes()
    assert cache.read_bytes() == whole.read_bytes()


def test_an_interrupt_that_a_library_turns_into_an_error_stays_one():
    """As torch's vmap does; an error without an interrupt stays an error, and Ctrl-C is Python's again afterwards."""

    def lose_an_interrupt():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("NYI") from None

    with pytest.raises(KeyboardInterrupt) as caught, interrupts_win():
        lose_an_interrupt()
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="NYI"), interrupts_win():
        raise RuntimeError("NYI")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# What people see, and what is refused


def test_the_table_is_on_stdout_and_the_json_in_its_file(capsys, text, tiny_onnx, fp32, tmp_path):
    arguments = ["eval", str(tiny_onnx("onnx-int4")), "--text", str(text), "--reference", str(fp32)]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert f"{found['perplexity']['value']:.2f}" in rows["perplexity of a token"]
    assert f"{found['comparison']['kl_mean']['value']:#.3g}" in rows["difference, mean"]
    assert f"{found['comparison']['top1_agreement']['value']:.1%}" in rows["same first choice"]
    assert f"{found['scored_tokens']:,} tokens scored" in rows["text"]
    assert rows["too few tokens for intervals"]
    assert "reference" in err
    assert "scoring" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        ("blåbær".encode("latin-1"), "is not UTF-8: byte 0xe5 at position 2"),
        (b"x", "the text has 1 tokens; at least 2 are needed"),
        (None, "No such file or directory"),
    ],
)
def test_a_text_that_cannot_be_scored_is_a_clear_error(capsys, fp32, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    require_error(capsys, 2, message, fp32, "--text", tmp_path / "text.txt")


def require_error(capsys, code, message, artifact, *arguments):
    assert main(["eval", str(artifact), *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    found = re.search(r"^error: (.*)\nhint: (\S.*)\n\Z", err, re.MULTILINE)
    assert found, err
    assert message in found[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--windows", "jumping"], 2, "--windows jumping is unknown"),
        (["--window-tokens", "65"], 2, "a window of 65 tokens is not possible"),
        (["--max-tokens", "0"], 2, "--max-tokens 0 leaves nothing to score"),
        (["--reference-cache", "x"], 2, "--reference-cache means nothing without --reference"),
        (["--ignore-field", "x"], 2, "--ignore-field means nothing without --reference"),
        (["--json", "nowhere/out.json"], 2, "there is no folder"),
        (["--reference", "no-such-model"], 1, "no preset and no folder is called 'no-such-model'"),
        (["--device", "GPU.77"], 1, "GPU.77"),
    ],
)
def test_wrong_options_are_clear_errors(capsys, fp32, text, arguments, code, message):
    require_error(capsys, code, message, fp32, "--text", text, *arguments)


@pytest.mark.parametrize("options", [["--json"], ["--reference", "demo", "--reference-cache"]])
def test_nothing_is_written_over_the_text(capsys, fp32, tmp_path, options):
    text = tmp_path / "tekst.txt"
    text.write_text("Dette er en tekst.")
    same = tmp_path / "x" / ".." / "tekst.txt"
    (tmp_path / "x").mkdir()
    require_error(capsys, 2, "both name", fp32, "--text", text, *options, same)
    assert text.read_text() == "Dette er en tekst."


def test_a_reference_of_another_vocabulary_is_refused(capsys, fp32, text, tmp_path):
    larger = make_mistral(tmp_path / "larger", vocab=300)
    require_error(
        capsys, 2, f"{larger} predicts 300 tokens, the artifact 261", fp32, "--text", text, "--reference", larger
    )


def test_a_reference_whose_tokenizer_splits_otherwise_is_refused(capsys, fp32, text, tmp_path):
    other = make_mistral(tmp_path / "other")
    document = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    edit_json(other / "tokenizer.json", model=document["model"])
    require_error(capsys, 2, "splits this text into other tokens", fp32, "--text", text, "--reference", other)


def test_another_tokenizer_file_that_splits_alike_is_accepted(capsys, fp32, text, tmp_path):
    """A chat model beside its base model: the files differ, the tokens do not."""
    other = make_mistral(tmp_path / "other", sliding_window=16, adds_bos=True)
    assert evaluate(capsys, fp32, "--text", text, "--reference", other)["comparison"]["kl_mean"]["value"] > 0


def test_a_reference_with_less_context_is_refused(capsys, fp32, text, tmp_path):
    short = make_mistral(tmp_path / "short", positions=32)
    require_error(
        capsys, 2, "a window of 64 tokens does not fit the reference's context, 32", fp32, "--text", text,
        "--reference", short,
    )  # fmt: skip


def test_a_field_of_the_reference_is_ignored_as_asked(capsys, fp32, text, tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    edit_json(checkpoint / "config.json", mystery=1)
    arguments = ["--text", text, "--max-tokens", "60", "--reference", checkpoint]
    require_error(capsys, 1, "the field mystery is unknown here", fp32, *arguments)
    found = evaluate(capsys, fp32, *arguments, "--ignore-field", "mystery")
    assert found["comparison"]["kl_mean"]["value"] < 1e-6
    require_error(capsys, 2, "is an artifact", fp32, "--text", text, "--reference", fp32, "--ignore-field", "mystery")


def test_the_cache_of_something_else_is_refused_and_kept(capsys, fp32, text, tiny_onnx, tmp_path):
    cache = tmp_path / "cache"
    arguments = ["--text", text, "--reference", fp32, "--reference-cache", cache]
    evaluate(capsys, tiny_onnx("onnx-int4"), *arguments)
    content = cache.read_bytes()
    require_error(capsys, 1, "belongs to other windows", tiny_onnx("onnx-int4"), *arguments, "--stride", "16")
    text.write_text(TEXT + "!", encoding="utf-8")
    require_error(capsys, 1, "belongs to another text", tiny_onnx("onnx-int4"), *arguments)
    assert cache.read_bytes() == content
    cache.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    text.write_text(TEXT, encoding="utf-8")
    require_error(capsys, 1, "was changed", tiny_onnx("onnx-int4"), *arguments)


def test_logits_that_are_no_numbers_are_an_error_and_not_a_figure(text):
    class Broken:
        def predict(self, windows):
            for window in windows:
                yield np.full((window.scored, 261), np.nan, np.float32)

    from normistral.errors import EngineError

    windows = cut(list(range(5, 100)), choose_windows("sliding", None, None, context_length=64, bos_id=None))
    with pytest.raises(EngineError, match="the artifact returned logits that are not finite"):
        score(Broken(), windows, None, None, lambda tokens: None)


def test_scoring_needs_no_torch(fp32, text):
    """What a runtime install can do: perplexity, and another artifact as reference."""
    code = (
        "import sys; from normistral.cli import main; "
        f"code = main(['eval', {str(fp32)!r}, '--text', {str(text)!r}, '--reference', {str(fp32)!r}]); "
        "sys.exit(code or bool({'torch', 'transformers', 'onnx'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
