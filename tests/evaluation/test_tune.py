"""The command `tune`: the whole search on scripted models, a short one on each engine, and what becomes of a result."""

import dataclasses
import json

import numpy as np
import pytest
from sample_artifacts import make_manifest
from scripted_models import make_tokenizer
from tiny_models import VOCABULARY

import normistral
from normistral import tuning
from normistral.artifact.manifest import hash_files, write_manifest
from normistral.cli import main
from normistral.errors import EngineError, ResourceError, UsageError
from normistral.hardware import Machine
from normistral.runtime.collect_env import heuristic_settings
from normistral.runtime.engines.base import EngineInfo
from normistral.runtime.engines.scripted import ScriptedBackend, random_logits
from normistral.runtime.model import Model
from normistral.runtime.tuned import list_tuned
from normistral.tuning import TuneOptions, tune

MACHINE = Machine("Prøve CPU", 4, 8, None, frozenset({"avx2", "avx512_vnni", "avx512_bf16"}), 2**34, 2**34)
CHUNK, GROUP, PRECISION = "prefill_chunk", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_PRECISION_HINT"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))


class Scripted:
    """An artifact whose models are scripted: their seconds and their error are functions of their settings."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = make_tokenizer(folder)
        architecture = dataclasses.replace(make_manifest().architecture, vocabulary=VOCABULARY)
        self.manifest = make_manifest(
            architecture=architecture, context_length=64, files=hash_files(folder), quality={"probe_kl_nats": 0.02}
        )
        write_manifest(folder, self.manifest)
        self.seconds = lambda settings: 1.0
        self.error = lambda settings: 0.0  # what is added to the logits, in standard deviations
        self.refused = lambda settings: False
        self.chosen = {"KV_CACHE_PRECISION": "u8", "ENABLE_CPU_PINNING": "YES"}  # by the engine
        self.opened, self.measured = [], []

    def open_model(self, artifact, config):
        assert all(model._closed for model in self.opened), "two models at a time"
        settings = {**self.chosen, **(config.tuned or {}), **config.settings}
        if self.refused(settings):
            raise EngineError("the engine does not take it")
        right, noise = random_logits(VOCABULARY), random_logits(VOCABULARY, seed=1)
        error = 0.0 if config.exact else self.error(settings)
        backend = ScriptedBackend(lambda ids: (right(ids) + error * noise(ids)).astype(np.float32))
        backend.capabilities = EngineInfo("openvino", config.device, int(settings.get(CHUNK, 256)), settings)
        self.opened.append(Model(backend, artifact.manifest, self.tokenizer))
        return self.opened[-1]

    def measure(self, model, work, seeds):
        self.measured.append(model.capabilities.settings)
        return self.seconds(model.capabilities.settings)


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    made = Scripted(tmp_path / "modell")
    monkeypatch.setattr(tuning, "open_model", made.open_model)
    monkeypatch.setattr(tuning, "measure_work", made.measure)
    monkeypatch.setattr(tuning, "read_machine", lambda: MACHINE)
    return made


def stored():
    return [result.content for result in list_tuned()]


def test_what_is_faster_is_kept(scripted):
    scripted.seconds = lambda settings: (
        (0.8 if settings[PRECISION] == "bf16" and settings[GROUP] == "0" else 1.0)
        * (0.5 if settings["INFERENCE_NUM_THREADS"] == "8" else 1.0)
        * (1 + int(settings[CHUNK]) / 1000)
    )
    tuned = tune(scripted.folder, TuneOptions())
    expected = {
        PRECISION: "bf16",
        GROUP: "0",
        "INFERENCE_NUM_THREADS": "8",
        "ENABLE_HYPER_THREADING": "YES",
        CHUNK: "64",
    }
    assert expected.items() <= tuned.settings.items()
    assert heuristic_settings(MACHINE, scripted.manifest).keys() <= tuned.settings.keys()
    assert set(tuned.changed) == set(expected)
    assert tuned.gain == pytest.approx(1.256 / (0.8 * 0.5 * 1.064))
    assert tuned.complete
    assert stored() == [dataclasses.replace(tuned, checksum=stored()[0].checksum)]
    assert all(model._closed for model in scripted.opened)


def test_where_nothing_is_faster_the_usual_settings_are_kept(scripted):
    tuned = tune(scripted.folder, TuneOptions())
    assert (tuned.changed, tuned.gain, tuned.complete) == ((), 1.0, True)
    assert len(stored()) == 1


def test_our_int4_kernel_is_compared_and_only_a_verdict_against_it_is_kept(scripted):
    scripted.chosen["int4_kernel"] = "normistral"
    assert "int4_kernel" not in tune(scripted.folder, TuneOptions()).settings
    scripted.seconds = lambda settings: 0.5 if settings["int4_kernel"] == "openvino" else 1.0
    tuned = tune(scripted.folder, TuneOptions())
    assert (tuned.settings["int4_kernel"], tuned.changed) == ("openvino", ("int4_kernel",))


def test_what_costs_quality_is_not_taken_though_it_is_faster(scripted):
    scripted.seconds = lambda settings: 0.5 if settings[PRECISION] == "bf16" else 1.0
    scripted.error = lambda settings: 0.2 if settings[PRECISION] == "bf16" else 0.01
    assert tune(scripted.folder, TuneOptions()).changed == ()
    tuned = tune(scripted.folder, TuneOptions(quality=10.0))
    assert tuned.settings[PRECISION] == "bf16"
    assert tuned.kl > 0.01
    assert tuned.kl_bound == 10.0


def test_where_the_usual_settings_cost_too_much_only_what_keeps_their_quality_is_taken(scripted):
    scripted.error = lambda settings: {"0": 0.0, "64": 0.3}.get(settings[GROUP], 0.4)
    scripted.seconds = lambda settings: {"0": 2.0, "64": 1.0}.get(settings[GROUP], 0.5)
    kept = tune(scripted.folder, TuneOptions())
    assert (kept.changed, kept.gain) == ((), 1.0)
    assert kept.kl == kept.kl_bound > 0.02
    with pytest.raises(UsageError, match=r"cost a KL divergence of 0\.\d+; --quality allows 0\.001"):
        tune(scripted.folder, TuneOptions(quality=0.001))


def test_what_the_engine_refuses_is_passed_over(scripted):
    scripted.refused = lambda settings: settings.get(PRECISION) == "bf16"
    scripted.seconds = lambda settings: 1 + int(settings[CHUNK]) / 1000
    assert tune(scripted.folder, TuneOptions()).changed == (CHUNK,)


def test_an_engine_that_refuses_the_usual_settings_is_an_error(scripted):
    scripted.refused = lambda settings: True
    with pytest.raises(EngineError, match="does not take it"):
        tune(scripted.folder, TuneOptions())
    assert stored() == []


@pytest.mark.parametrize(("won", "kept"), [(True, [(GROUP,)]), (False, [])])
def test_an_interrupt_keeps_only_what_won_its_paired_test(scripted, won, kept):
    def seconds(settings):
        if settings[CHUNK] != "256" or (not won and len(scripted.measured) > 8):
            raise KeyboardInterrupt  # the last variants begin, or the first paired test is under way
        return 0.5 if settings[GROUP] == "32" else 1.0

    scripted.seconds = seconds
    with pytest.raises(KeyboardInterrupt):
        tune(scripted.folder, TuneOptions())
    assert [tuned.changed for tuned in stored()] == kept
    assert all(not tuned.complete for tuned in stored())
    assert all(model._closed for model in scripted.opened)


def test_when_the_time_is_up_the_result_says_so(scripted):
    now = [0.0]

    def seconds(settings):
        now[0] += 1.0
        return 0.5 if settings[GROUP] == "32" else 1.0

    scripted.seconds = seconds
    tuned = tune(scripted.folder, TuneOptions(budget_minutes=0.1), clock=lambda: now[0])
    assert (tuned.changed, tuned.complete) == ((), False)
    assert 6 <= now[0] <= 8
    now[0] = 0.0
    tuned = tune(scripted.folder, TuneOptions(budget_minutes=0.4), clock=lambda: now[0])
    assert (tuned.changed, tuned.complete) == ((GROUP,), False)  # won, and the threads were still to come
    assert tuned.gain == pytest.approx(2.0)


def test_no_time_at_all_keeps_nothing(scripted):
    ticks = iter(range(100))
    with pytest.raises(ResourceError, match="before anything was compared") as caught:
        tune(scripted.folder, TuneOptions(budget_minutes=0.001), clock=lambda: float(next(ticks)))
    assert "--budget" in caught.value.hint
    assert stored() == []


def test_what_does_not_fit_is_refused(scripted, monkeypatch):
    monkeypatch.setattr(tuning, "available_memory_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"takes about 0\.\d GB to run, and 0\.0 GB of memory are there"):
        tune(scripted.folder, TuneOptions())
    assert scripted.opened == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_minutes": 0}, "a budget of 0 minutes is none"),
        ({"budget_minutes": float("nan")}, "a budget of nan minutes"),
        ({"quality": -1}, "a quality bound of -1 is none"),
        ({"quality": float("nan")}, "a quality bound of nan"),
        ({"profile": "speed"}, "there is no profile 'speed'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(scripted, options, message):
    with pytest.raises(UsageError, match=message):
        tune(scripted.folder, TuneOptions(**options))
    assert scripted.opened == []


def test_nothing_is_written_into_the_artifact(scripted):
    before = {path.name: path.stat().st_mtime_ns for path in scripted.folder.iterdir()}
    tune(scripted.folder, TuneOptions())
    assert {path.name: path.stat().st_mtime_ns for path in scripted.folder.iterdir()} == before


@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_an_engine_is_tuned_and_load_finds_it(format, tiny_fp16, tiny_onnx, monkeypatch, capsys):
    """Speeds of a tiny model are noise, so one setting does; its seconds are real, and 40 tokens at once win mostly."""
    folder = tiny_fp16 if format == "openvino" else tiny_onnx("onnx-int4")
    monkeypatch.setattr(tuning, "variants_to_try", lambda *arguments: [{CHUNK: "1"}, {CHUNK: "512"}])
    assert main(["tune", str(folder), "--profile", "batch", "--quality", "1", "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["artifact"], document["profile"], document["complete"]) == (folder.name, "batch", True)
    assert document["settings"][CHUNK] in ("256", "512")
    assert 0 <= document["kl"] <= document["kl_bound"] == 1.0
    assert document["gain"] == pytest.approx(document["rule_s"] / document["tuned_s"])
    assert "the usual settings: passes" in printed.err

    with normistral.load(folder) as model:
        assert model.capabilities.settings_source == "tuned"
        assert document["settings"].items() <= model.capabilities.settings.items()
    with normistral.load(folder, settings={CHUNK: "128"}) as model:
        assert (model.capabilities.settings_source, model.capabilities.overrides) == ("tuned", (CHUNK,))
        assert model.capabilities.prefill_chunk == 128
    with normistral.load(folder, exact=True) as model:
        assert (model.capabilities.settings_source, model.capabilities.prefill_chunk) == ("exact", 256)

    assert main(["doctor", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"What will be used for {folder.name}: settings tuned on this machine" in shown
    assert "tuned for batch on " in shown
    assert "holds here" in shown

    [result] = list_tuned()
    result.path.write_bytes(b"{}")
    assert main(["doctor", str(folder)]) == 0
    assert f"what was tuned for {folder.name} is not used" in capsys.readouterr().out
    with normistral.load(folder) as model:
        assert model.capabilities.settings_source == "rule"

    assert main(["tune", str(folder), "--forget"]) == 0
    assert "1 result dropped" in capsys.readouterr().err
    assert stored() == []
