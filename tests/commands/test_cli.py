"""The command line: what goes to stdout and stderr, exit codes, and every error in two lines."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from fork_server import run_forked
from sample_artifacts import BIG_FILE, SMALL_FILE
from scripted_cli import HELPERS, command, make_artifact

from normistral import errors
from normistral.artifact.manifest import Manifest, RecipeRecord, read_manifest, write_manifest
from normistral.artifact.presets import PRESETS
from normistral.cli import main
from normistral.commands import console
from normistral.commands.info import describe_weights
from normistral.commands.progress import PlainProgress, Running, fit_row, format_duration
from normistral.export.recipe import Recipe
from normistral.runtime.options import GenerationConfig

ANSWER = "Blåbærsyltetøy på brød, 😀."


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "artifacts"


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "scripted")


def run(tmp_path, *arguments, stdin=None, settings=None, env=None):
    """Run in a process of its own; stdout and stderr as bytes."""
    settings = {"answers": [ANSWER]} | (settings or {})
    words = command(tmp_path, *map(str, arguments), **settings)
    environment = os.environ | (env or {})
    if not any(name.startswith(("LC_", "PYTHON")) for name in env or ()):
        return run_forked(words, stdin=stdin or b"", cwd=HELPERS, env=environment)
    return subprocess.run(
        words,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=60,
        cwd=HELPERS,
        env=environment,
    )


def require_two_lines(stderr: str) -> tuple[str, str]:
    """The message and the hint of exactly one error."""
    found = re.fullmatch(r"error: (\S.*)\nhint: (\S.*)\n", stderr)
    assert found, stderr
    return found[1], found[2]


# One answer


def test_the_answer_alone_is_on_stdout(tmp_path, artifact):
    done = run(tmp_path, "chat", artifact, "--prompt", "Hva spiser du?")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, ANSWER + "\n", b"")


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_norwegian_letters_come_out_whole_in_any_locale(tmp_path, artifact, locale):
    done = run(tmp_path, "chat", artifact, "--prompt", "blåbær", "--system", "Vær snill", env=locale)
    assert (done.returncode, done.stdout.decode("utf-8")) == (0, ANSWER + "\n")
    missing = run(tmp_path, "chat", "blåbær", "--prompt", "x", env=locale)
    assert missing.returncode == 1
    if "LC_ALL" not in locale:  # there the name has become bytes that no path can hold
        assert "blåbær" in missing.stderr.decode("utf-8")


def test_a_prompt_may_come_through_a_pipe(tmp_path, artifact):
    done = run(tmp_path, "chat", artifact, "--json", stdin=b"Hva spiser du?\n")
    typed = run(tmp_path, "chat", artifact, "--json", "--prompt", "Hva spiser du?")
    assert done.returncode == 0
    piped, typed = json.loads(done.stdout), json.loads(typed.stdout)
    assert piped["timings"]["prompt_tokens"] == typed["timings"]["prompt_tokens"]
    assert piped["text"] == ANSWER
    assert piped["finish_reason"] == "stop"


def test_piped_bytes_that_are_no_text_are_refused(tmp_path, artifact):
    done = run(tmp_path, "chat", artifact, stdin=b"bl\xe5")
    message, _ = require_two_lines(done.stderr.decode())
    assert (done.returncode, done.stdout) == (2, b"")
    assert "byte 0xe5 at position 2" in message


@pytest.mark.parametrize("stdin", [b"", b" \n"])
@pytest.mark.parametrize("name", ["chat", "generate"])
def test_an_empty_prompt_is_wrong_usage(tmp_path, artifact, stdin, name):
    done = run(tmp_path, name, artifact, stdin=stdin)
    message, _ = require_two_lines(done.stderr.decode())
    assert (done.returncode, message) == (2, "the prompt is empty")


def test_an_answer_that_is_cut_off_is_said_to_be(tmp_path, artifact):
    done = run(tmp_path, "chat", artifact, "--prompt", "x", "--max-new-tokens", "2", "--stats")
    assert done.stdout.decode() == ANSWER[:2] + "\n"  # this tokenizer's tokens are bytes
    warning, stats = done.stderr.decode().splitlines()
    assert warning == "warning: the answer is cut off: --max-new-tokens was reached"
    assert stats.startswith("2 tokens at ")


def test_options_reach_the_model(tmp_path, artifact):
    done = run(tmp_path, "chat", artifact, "--prompt", "x", "--stop", "på", "--stop", "zzz", "--greedy")
    assert done.stdout.decode() == "Blåbærsyltetøy \n"


def test_control_characters_reach_a_pipe_unchanged(tmp_path, artifact):
    done = run(tmp_path, "chat", artifact, "--prompt", "x", settings={"answers": ["\x1b[31mrød\x07"]})
    assert done.stdout.decode() == "\x1b[31mrød\x07\n"


def test_generate_completes_without_a_template(tmp_path, artifact):
    done = run(tmp_path, "generate", artifact, "--prompt", "<|im_start|> assistant\n", "--json")
    assert json.loads(done.stdout)["text"] == ANSWER
    assert json.loads(done.stdout)["timings"]["prompt_tokens"] < 20


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        (" God morgen.\nEngelsk: Good night.", [], " God morgen.\nEngelsk: Good night.\n"),
        (" God morgen.\nEngelsk: Good night.", ["--stop-at-newline"], " God morgen.\n"),
        (" God morgen.\r\nEngelsk: Good night.", ["--stop-at-newline", "--stop", "\r"], " God morgen.\n"),
        (" God morgen.\nEngelsk: Good night.", ["--stop-at-newline", "--stop", " morgen"], " God\n"),
        (" \nGod morgen.", ["--stop-at-newline"], " \n"),
    ],
)
def test_generate_can_stop_at_the_first_line_break(tmp_path, artifact, answer, options, expected):
    prompt = ["--prompt", "Engelsk: Good morning.\nBokmål:"]
    done = run(tmp_path, "generate", artifact, *prompt, *options, settings={"answers": [answer], "after": "Bokmål:"})
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected, b"")


def test_what_does_not_fit_is_an_error_with_a_way_out(tmp_path, artifact):
    done = run(tmp_path, "chat", artifact, "--prompt", "x" * 500)
    message, hint = require_two_lines(done.stderr.decode())
    assert (done.returncode, done.stdout) == (1, b"")
    assert "400" in message
    assert "shorten" in hint


def test_a_base_model_is_sent_to_generate(tmp_path):
    base = make_artifact(tmp_path / "base", template=None, role="base")
    done = run(tmp_path, "chat", base, "--prompt", "x")
    message, hint = require_two_lines(done.stderr.decode())
    assert (done.returncode, done.stdout) == (2, b"")
    assert message == "base is a base model: it completes text and cannot chat"
    assert hint == f"use: normistral generate {base} --prompt TEXT"


def test_without_a_name_the_only_artifact_is_meant(tmp_path, own_store):
    make_artifact(own_store / "mitt")
    assert run(tmp_path, "chat", "--prompt", "x").stdout.decode() == ANSWER + "\n"
    make_artifact(own_store / "ditt")
    done = run(tmp_path, "chat", "--prompt", "x")
    assert done.returncode == 1
    assert "ditt, mitt" in require_two_lines(done.stderr.decode())[0]


def test_answers_need_a_terminal_or_a_prompt(tmp_path, artifact):
    import pty

    leader, follower = pty.openpty()  # stdin is a terminal, stdout is not
    try:
        done = subprocess.run(
            command(tmp_path, "chat", str(artifact)),
            stdin=follower,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=HELPERS,
        )
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 2
    assert "--prompt" in require_two_lines(done.stderr)[1]


# Ends


def test_a_reader_that_leaves_ends_it_quietly(tmp_path, artifact):
    process = subprocess.Popen(
        command(tmp_path, "chat", str(artifact), "--prompt", "x", answers=["a" * 200], pause_s=0.02),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=HELPERS,
    )
    assert process.stdout.read(1) == b"a"  # streamed, not gathered
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_interrupt_ends_with_130_and_keeps_what_was_written(tmp_path, artifact):
    process = subprocess.Popen(
        command(tmp_path, "chat", str(artifact), "--prompt", "x", answers=["a" * 3000], pause_s=0.05),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=HELPERS,
    )
    assert os.read(process.stdout.fileno(), 1) == b"a"
    process.send_signal(signal.SIGINT)
    rest, complaints = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch(rb"a*\n", rest)
    assert complaints == b"\n"


def test_an_interrupt_while_modules_are_imported_shows_no_traceback():
    code = """if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)

        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "normistral.commands.console":
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Interrupting())
        from normistral.__main__ import main
        main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_an_interrupt_that_a_package_makes_an_import_error_of_is_one(monkeypatch, capsys):
    def fail():
        try:
            raise ImportError("initialization failed") from KeyboardInterrupt()  # as pybind11 does
        except ImportError as exc:
            raise errors.MissingExtraError("no engine") from exc

    monkeypatch.setattr("normistral.artifact.store.list_artifacts", fail)
    assert main(["models"]) == 130
    assert capsys.readouterr() == ("", "\n")


def test_a_bug_is_two_lines_and_a_traceback_only_with_debug(monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError("fem\nog seks")

    monkeypatch.setattr("normistral.artifact.store.list_artifacts", fail)
    assert main(["models"]) == 1
    message, hint = require_two_lines(capsys.readouterr().err)
    assert "ZeroDivisionError: fem og seks" in message
    assert "--debug" in hint
    assert main(["models", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main(["--debug", "models"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main(["models"]) == 1  # it is not remembered
    require_two_lines(capsys.readouterr().err)


# Errors


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["nonsense"], 2, "nonsense"),
        (["chat", "--nonsense"], 2, "--nonsense"),
        (["generate"], 2, "ARTIFACT"),
        (["export"], 2, "MODEL"),
        (["generate", "x", "y", "--prompt", "z"], 2, "y"),
        (["chat", "x", "--prompt"], 2, "--prompt"),
        (["chat", "x", "--prompt", "y", "--overflow", "forget"], 2, "forget"),
        (["chat", "x", "--prompt", "y", "--top-k", "many"], 2, "many"),
        (["chat", "x", "--prompt", "y", "--temperature", "-1"], 2, "temperature"),
        (["chat", "x", "--prompt", "y", "--greedy", "--temperature", "1"], 2, "--temperature"),
        (["chat", "x", "--prompt", "y", "--greedy", "--top-k", "3"], 2, "--top-k"),
        (["chat", "x", "--prompt", "y", "--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["chat", "x", "--prompt", ""], 2, "empty"),
        (["chat", "x", "--prompt", "y", "--stop-at-newline"], 2, "--stop-at-newline"),
        (["chat", "x", "--prompt", "y", "--set", "prefill_chunk"], 2, "'prefill_chunk' is no setting"),
        (["tune"], 2, "ARTIFACT"),
        (["tune", "x"], 1, "no artifact 'x'"),
        (["tune", "x", "--budget", "0"], 2, "a budget of 0 minutes is none"),
        (["tune", "x", "--forget", "--budget", "3"], 2, "--forget measures nothing"),
        (["doctor", "x"], 1, "no artifact 'x'"),
        (["generate", "x", "--prompt", "y", "--set", "a=1", "--set", "a=2"], 2, "the setting a is given twice"),
        (["chat", "x", "--prompt", "y"], 1, "no artifact 'x'"),
        (["generate", "x", "--prompt", "y"], 1, "no artifact 'x'"),
        (["info", "x"], 1, "no artifact 'x'"),
        (["info", "x\x1b[31m\ny"], 1, "no artifact"),
        (["export", "demo", "out", "--weights", "int3"], 2, "int3"),
        (["export", "demo", "out", "--weights", "fp16", "--ratio", "0.5"], 2, "ratio means nothing"),
        (["export", "demo", "out", "--weights", "fp16", "--asymmetric"], 2, "symmetric means nothing"),
        (["export", "demo", "out", "--weights", "fp16", "--recipe", "best"], 2, "recipe means nothing"),
        (["export", "demo", "out", "--format", "gguf"], 2, "'gguf' is not one of 'openvino', 'onnx'"),
        (
            ["export", "demo", "out", "--format", "onnx", "--recipe", "fast", "--ratio", "0.5"],
            2,
            "the recipe fast rounds all layers alike in ONNX",
        ),
        (["export", "demo", "out", "--format", "onnx", "--graph", "plain"], 2, "a plain graph has no int4 weights"),
        (["export", "demo", "out", "--graph", "fused"], 2, "graph means nothing"),
        (["export", "demo", "out", "--weights", "fp32"], 2, "OpenVINO artifacts have no fp32 weights"),
        (["export", "demo", "out", "--context", "1"], 2, "at least 16 tokens"),
        (["export", "nonsense", "out"], 1, "nonsense"),
    ],
)
def test_errors_are_two_lines_on_stderr(tmp_path, monkeypatch, capsys, arguments, code, expected):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    printed = capsys.readouterr()
    message, _ = require_two_lines(printed.err)
    assert expected in message
    assert printed.out == ""
    assert "\x1b" not in printed.err
    assert not (tmp_path / "out").exists()


def test_every_kind_of_error_gets_its_exit_code_and_a_hint(monkeypatch, capsys):
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 10
    for kind in kinds:

        def fail(kind=kind):
            raise kind("åtte")

        monkeypatch.setattr("normistral.artifact.store.list_artifacts", fail)
        assert main(["models"]) == (2 if kind is errors.UsageError else 1)
        message, _ = require_two_lines(capsys.readouterr().err)
        assert message == "åtte"


def test_what_the_operating_system_refuses_is_no_bug(monkeypatch, capsys):
    def fail():
        raise PermissionError(13, "Permission denied", "/store")

    monkeypatch.setattr("normistral.artifact.store.list_artifacts", fail)
    assert main(["models"]) == 1
    assert require_two_lines(capsys.readouterr().err)[0] == "/store: permission denied"


# Help


def test_help_tells_the_defaults_that_are_in_force(capsys):
    assert main(["chat", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    ours = GenerationConfig()
    assert f"Most tokens to write; -1 is as many as fit. (*) {ours.max_new_tokens}" in text
    assert f"0 is greedy. (*) {ours.temperature:g}" in text
    assert "authors published comes first" in text
    assert main(["export", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Default: {Recipe().backup}." in text
    assert "Default: symmetric, but for int4 with the recipe best." in text
    assert f"Default: {Recipe('int4').recipe_name} for int4, {Recipe('int8').recipe_name} for int8." in text
    assert "--asymmetric" in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_help_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    names = "models export list show rm chat generate batch serve eval info bench tune bundle doctor"
    for name in names.split():
        assert re.search(rf"^  {name} ", printed.out, re.MULTILINE)
    groups = ("Models", "Use a model", "Measure and tune", "This machine, and others")
    assert [line[:-1] for line in printed.out.splitlines() if line[:-1] in groups] == list(groups)
    assert "..." not in printed.out.partition("Models:")[2]  # no summary is cut


def test_the_version(capsys):
    import normistral

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"normistral {normistral.__version__}\n"


@pytest.mark.parametrize("module", ["normistral", "normistral.cli"])
def test_it_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "models"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "7b-warm-instruct" in done.stdout


# Looking


def test_models_lists_presets_and_artifacts(own_store, capsys):
    make_artifact(own_store / "mitt")
    broken = make_artifact(own_store / "ødelagt")
    (broken / "normistral.json").write_text("{}")
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    for preset in PRESETS:
        facts = rf"{re.escape(preset.role or '?')} .*{re.escape(preset.licence or '?')}"
        assert re.search(rf"^  {preset.name} +{re.escape(preset.source)} +{facts}", text, re.M)
    assert re.search(r"^  mitt +16\.8 MB +openvino +int4 +chat +128 +example/model$", text, re.M)
    assert re.search(r"^  ødelagt: .*was changed", text, re.M)
    assert main(["models", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [preset["name"] for preset in document["presets"]] == [preset.name for preset in PRESETS]
    assert [artifact["name"] for artifact in document["artifacts"]] == ["mitt", "ødelagt"]
    assert document["artifacts"][0]["total_bytes"] > 16e6
    assert "problem" in document["artifacts"][1]


def test_info_shows_the_manifest(artifact, capsys):
    assert main(["info", str(artifact)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "example/model at 0123abcd",
        "groups of 64",
        "128 tokens",
        "token 2, 4",
        "temperature 0.3, top_k 64",
    ):
        assert expected in text
    assert main(["info", str(artifact), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["notes"] == ["gruppestørrelse 64"]
    assert document["files"][BIG_FILE]["size"] > 16e6


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (RecipeRecord("int4", True, 64, 1.0, "int8_asym", 8), "int4, symmetric, groups of 64; others int8_asym; "),
        (RecipeRecord("int4", False, -1, 0.8, "fp", 4), "int4, asymmetric, one scale per channel, 80% of the layers; "),
        (RecipeRecord("int8", symmetric=True), "int8, symmetric"),
        (RecipeRecord("int8", symmetric=True, recipe="best"), "int8, symmetric, recipe best"),
        (RecipeRecord("int8", symmetric=True, group_size=32, graph="fused"), "groups of 32; fused graph"),
        (RecipeRecord("fp32", graph="plain"), "fp32; plain graph"),
    ],
)
def test_weights_are_described_with_their_graph(recipe, expected):
    assert expected in describe_weights(recipe)


@pytest.mark.parametrize("kind", ["changed", "truncated", "missing"])
def test_info_check_finds_every_damaged_file(artifact, capsys, kind):
    assert main(["info", str(artifact), "--check"]) == 0
    assert "files are as they were exported" in capsys.readouterr().out
    for name in (SMALL_FILE, BIG_FILE):
        path = artifact / name
        if kind == "missing":
            path.unlink()
        elif kind == "truncated":
            os.truncate(path, path.stat().st_size - 1)
        else:
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
    assert main(["info", str(artifact), "--check"]) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith("hint: export, copy or download it again (normistral rm NAME removes it)\n")
    assert "2 damaged or missing files" in printed.err
    assert sum(str(artifact / name) + " " in printed.out for name in (SMALL_FILE, BIG_FILE)) == 2
    assert main(["info", str(artifact), "--check", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_a_newer_artifact_asks_for_an_upgrade(artifact, capsys):
    manifest: Manifest = read_manifest(artifact)
    write_manifest(artifact, replace(manifest, schema_version=99))
    assert main(["info", str(artifact)]) == 1
    message, hint = require_two_lines(capsys.readouterr().err)
    assert "schema 99" in message
    assert "--upgrade" in hint


def test_doctor_reports_machine_and_engines(capsys):
    import onnxruntime
    import openvino

    from normistral.hardware import plan_onnxruntime, plan_openvino, plan_threads, read_machine

    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    machine = read_machine()
    assert report["openvino"]["version"] == openvino.__version__
    assert "CPU" in report["openvino"]["devices"]
    assert report["threads"] == plan_threads(machine)
    assert report["settings"]["int4"] == plan_openvino(machine, "int4")
    assert report["onnxruntime"]["version"] == onnxruntime.__version__
    assert report["onnxruntime"]["devices"]["CPU"] == "CPUExecutionProvider"
    assert report["onnx_settings"] == plan_onnxruntime(machine)
    assert report["packages"]["numpy"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"{plan_threads(machine)} threads: " in text
    assert openvino.__version__ in text
    assert re.search(r"CPU +CPUExecutionProvider\n", text)
    assert f"intra_op_num_threads={plan_threads(machine)}" in text


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import openvino_that_is_not_there", "ModuleNotFoundError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("print('x')", "nothing that could be read"),
    ],
)
def test_doctor_works_when_an_engine_does_not(monkeypatch, capsys, code, expected):
    from normistral.runtime import collect_env

    monkeypatch.setattr(collect_env, "_ASK_OPENVINO", code)
    monkeypatch.setattr(collect_env, "_ASK_ONNXRUNTIME", code)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(rf"cannot be used: .*{expected}", text)) == 2
    assert "pip install --force-reinstall --no-deps openvino\n" in text
    assert "pip install --force-reinstall --no-deps onnxruntime\n" in text
    assert "threads" in text


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ([], r"cannot be used: not installed: pip install \"normistral\[onnx\]\""),
        (["onnxruntime", "onnxruntime-gpu"], "onnxruntime and onnxruntime-gpu overwrite each other"),
    ],
)
def test_doctor_knows_how_many_builds_of_onnxruntime_there_are(monkeypatch, capsys, installed, expected):
    from normistral.runtime import collect_env

    version = collect_env._version
    builds = {**dict.fromkeys(collect_env._ONNX), **dict.fromkeys(installed, "1.32.0")}
    monkeypatch.setattr(collect_env, "_version", lambda name: builds[name] if name in builds else version(name))
    assert main(["doctor"]) == 0
    assert re.search(expected, capsys.readouterr().out)


# Console


def test_harmless_leaves_text_alone_and_shows_controls():
    assert console.harmless("æøå 😀\n\tx") == "æøå 😀\n\tx"
    assert console.harmless("\x1b]0;x\x07\r\x7f\x9b1m") == "␛]0;x␇␍␡\ufffd1m"


def test_columns_are_aligned_and_whole():
    assert console.format_columns([("å", "b"), ("日本", "c" * 200)]) == "å     b\n日本  " + "c" * 200


class _Terminal:
    closed = False

    def isatty(self):
        return True


def test_colours_only_where_they_are_wanted(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.colour("x", "31", _Terminal()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.colour("x", "31", _Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert console.colour("x", "31", _Terminal()) == "x"
    assert console.colour("x", "31", sys.stdout) == "x"


def test_progress_is_lines_in_a_log_and_bars_at_a_terminal(monkeypatch, capsys):
    from normistral.commands.progress import show_progress

    def work():
        with show_progress() as progress:
            with progress.stage("hashing [b]", 5_000_000, "bytes") as stage:
                stage.advance(2_000_000)
                stage.set_total(6_000_000)
                time.sleep(0.15)  # bars are drawn ten times a second
            progress.note("gruppe\x1b 64")

    work()
    assert capsys.readouterr().err == "hashing [b] (5 MB)\n  gruppe␛ 64\n"
    monkeypatch.setattr("normistral.commands.progress.is_terminal", lambda stream: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    work()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "33%" in drawn
    assert "2 MB of 6 MB" in drawn
    assert re.search(r"✓ hashing \[b\]  0\.\d s\n", drawn)
    assert "  gruppe␛ 64\n" in drawn


ROW = Running("rounding on sample texts", "weights", 53.1e6, 106.2e6, 1.25e6, 42.0, 40.0)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (38, "rounding on sample texts  50%"),
        (40, "rounding on sample texts  50%  42 s left"),
        (78, "rounding on sample texts  50%  42 s left  1.2 million weights/s"),
        (118, "rounding on sample texts  50%  42 s left  1.2 million weights/s  53.1 million of 106.2 million weights"),
        (28, "rounding …  50%  42 s left"),
    ],
)
def test_a_row_of_progress_has_what_fits_in_whole_words(cells, expected):
    row = fit_row(ROW, cells)
    assert row.startswith(expected)
    assert console.cell_width(row) <= cells


def test_a_slow_stage_shows_its_time_in_place_of_its_rate():
    row = fit_row(Running("rounding", "layers", 3, 20, 0.02, 850.0, 150.0), 70)
    assert row.startswith("rounding  15%  14 min 10 s left  2 min 30 s so far  3 of 20 layers")


def test_a_log_tells_twice_a_minute_where_a_long_stage_is(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("normistral.commands.progress.time.perf_counter", lambda: clock[0])
    with PlainProgress().stage("rounding", 4, "layers") as stage:
        for seconds in (20.0, 40.0, 60.0, 80.0):
            clock[0] = seconds
            stage.advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "rounding (4 layers)",
        "  50%, 40 s left, 40 s so far, 2 of 4 layers",
        "  100%, 0.0 s left, 1 min 20 s so far, 4 of 4 layers",
        "  done in 1 min 20 s",
    ]


def test_a_stage_without_a_total_shows_the_time_that_it_took():
    assert fit_row(Running("starting the tools", "", 0, None, None, None, 75.4), 40) == "starting the tools  1 min 15 s"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.7, "1 min 00 s"), (3599, "59 min 59 s"), (9000, "2 h 30 min")],
)
def test_durations(seconds, expected):
    assert format_duration(seconds) == expected


def test_what_is_left_out_of_a_long_document_is_said(tmp_path):
    make_artifact(tmp_path / "mitt")
    long = ("Snøen falt tett over fjellet. " * 40 + "Hva falt?").encode()
    chat = ("chat", tmp_path / "mitt", "--max-new-tokens", "9")
    refused = run(tmp_path, *chat, stdin=long)
    assert refused.returncode == 1
    assert b"--overflow drop-oldest or cut-middle" in refused.stderr
    cut = run(tmp_path, *chat, "--overflow", "cut-middle", stdin=long)
    assert cut.returncode == 0
    line = cut.stderr.decode().splitlines()[0]
    told = re.fullmatch(
        r"warning: ([\d,]+) tokens are left out for lack of room: characters ([\d,]+) to ([\d,]+) of message 1", line
    )
    assert told, line
    document = json.loads(run(tmp_path, *chat, "--overflow", "cut-middle", "--json", stdin=long).stdout)
    assert f"{document['left_out']['tokens']:,}" == told[1]
    assert [f"{document['left_out']['cuts'][0][end]:,}" for end in ("start", "end")] == [told[2], told[3]]
    in_bokmaal = run(tmp_path, *chat, "--overflow", "cut-middle", stdin=long, env={"NORMISTRAL_LANG": "nb"}).stderr
    assert "tokener er utelatt av plassmangel: tegn" in in_bokmaal.decode()
    assert json.loads(run(tmp_path, *chat, "--json", stdin=b"Hei").stdout)["left_out"] is None


def test_samplers_of_the_command_line_reach_the_model(tmp_path, artifact):
    """A bias forbids the answer's first letter."""
    for options, expected in (
        (["--logit-bias", f"{byte_id(ANSWER[0])}=-100"], 0),
        (["--presence-penalty", "1", "--frequency-penalty", "0.5", "--typical-p", "0.9"], 0),
        (["--dry-multiplier", "1", "--dry-sequence-breaker", "a", "--xtc-probability", "0.5"], 0),
        (["--logit-bias", "s=1"], 2),
        (["--logit-bias", "1=101"], 2),
        (["--logit-bias", "999999=1"], 2),
        (["--greedy", "--xtc-probability", "1"], 2),
        (["--max-new-tokens", "-1"], 0),
    ):
        done = run(tmp_path, "chat", artifact, "--prompt", "x", *options)
        assert done.returncode == expected, (options, done.stderr)
        assert b"Traceback" not in done.stderr
        if options[0] == "--logit-bias" and expected == 0:
            assert not done.stdout.startswith(ANSWER[:1].encode())


def byte_id(letter: str) -> int:
    """Of the byte-level vocabulary of the tests."""
    from tiny_models import SPECIALS
    from tokenizers import pre_tokenizers

    return len(SPECIALS) + sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter)


INTERRUPTED_AGAIN = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
import normistral.__main__, normistral.cli

class Freed:
    def __del__(self):
        if sys.argv[1] == "frees":
            raise KeyboardInterrupt

def interrupted():
    freed = Freed()
    return 130

normistral.cli.main = interrupted
if sys.argv[1] == "ends":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.exit(normistral.__main__.main())
"""


@pytest.mark.parametrize(("when", "code"), [("frees", 130), ("ends", -signal.SIGINT)])
def test_another_interrupt_while_an_interrupted_command_frees_or_ends_is_quiet(when, code):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_AGAIN, when], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, b"")
