"""Results of a tuning as files: their key, damage, and what `doctor` says of them."""

import dataclasses
import json
import logging
import os

import pytest
from planted import AS_ROOT, KINDS, NOBODY, look, plant
from sample_artifacts import write_artifact

from normistral.artifact import store
from normistral.errors import ResourceError
from normistral.hardware import Machine
from normistral.runtime.collect_env import describe_artifact
from normistral.runtime.tuned import (
    Tuned,
    find_mismatch,
    find_tuned,
    forget_tuned,
    list_tuned,
    make_key,
    read_tuned,
    save_tuned,
    tuned_path,
)

MACHINE = Machine("Prøve CPU", 4, 8, None, frozenset({"avx2", "fma"}), 2**34, 2**34)
SETTINGS = {"INFERENCE_NUM_THREADS": "3", "prefill_chunk": "512"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def artifact(tmp_path):
    write_artifact(tmp_path / "modell")
    return tmp_path / "modell"


def key_of(artifact, machine=MACHINE, engine="openvino", version="2026.4.1", device="CPU"):
    return make_key(artifact, machine, engine, version, device)


def result(key, **changes):
    made = Tuned(
        key,
        "modell",
        "2026-11-24T12:00:00+00:00",
        "chat",
        SETTINGS,
        ("prefill_chunk",),
        rule_s=10.0,
        tuned_s=8.0,
        kl=0.001,
        kl_bound=0.002,
        complete=True,
    )
    return dataclasses.replace(made, **changes)


def without_checksum(tuned):
    return dataclasses.replace(tuned, checksum="")


def test_a_home_that_no_folder_can_be_in_holds_nothing_and_warns_of_nothing(artifact, tmp_path, monkeypatch, caplog):
    (tmp_path / "fil").touch()
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "fil" / "hjem"))  # as HOME=/dev/null of many services
    assert find_tuned(key_of(artifact)) is None
    assert caplog.text == ""
    described = describe_artifact(artifact, MACHINE, {"openvino": "2026.4.1"})
    assert (described["basis"], described["problem"]) == ("rule", None)


def test_what_was_saved_is_found(artifact):
    key = key_of(artifact)
    assert find_tuned(key) is None
    path = save_tuned(result(key))
    assert path.parent == store.tuned_dir()
    found = find_tuned(key)
    assert without_checksum(found) == result(key)
    assert found.gain == 1.25
    assert [path.name for path in store.tuned_dir().iterdir()] == [path.name]  # and no temporary neighbour


def test_a_new_result_takes_the_place_of_the_old(artifact):
    save_tuned(result(key_of(artifact, version="2025.1")))
    save_tuned(result(key_of(artifact), profile="batch"))
    assert find_tuned(key_of(artifact)).profile == "batch"
    assert len(list(list_tuned())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "another"},
        {"physical_cores": 2},
        {"logical_cpus": 4},
        {"cpu_quota": 2.0},  # two threads instead of four
        {"instruction_sets": frozenset({"avx2"})},
    ],
)
def test_another_machine_is_left_alone(artifact, change, caplog):
    save_tuned(result(key_of(artifact)))
    other = key_of(artifact, dataclasses.replace(MACHINE, **change))
    assert find_tuned(other) is None
    assert caplog.text == ""  # nothing is wrong: the store may serve several machines
    save_tuned(result(other))
    assert find_tuned(key_of(artifact)) is not None
    assert len(list(list_tuned())) == 2


def test_memory_and_a_quota_that_changes_no_thread_do_not_count(artifact):
    save_tuned(result(key_of(artifact)))
    machine = dataclasses.replace(MACHINE, cpu_quota=8.0, total_memory_bytes=1, available_memory_bytes=1)
    assert find_tuned(key_of(artifact, machine)) is not None


def test_another_artifact_and_another_device_are_others(artifact, tmp_path):
    save_tuned(result(key_of(artifact)))
    write_artifact(tmp_path / "annen", context_length=64)
    assert find_tuned(key_of(tmp_path / "annen")) is None
    assert find_tuned(key_of(artifact, device="GPU")) is None


def test_a_copy_of_the_artifact_has_the_same_result(artifact, tmp_path):
    save_tuned(result(key_of(artifact)))
    artifact.rename(tmp_path / "flyttet")
    assert find_tuned(key_of(tmp_path / "flyttet")) is not None


def test_a_new_engine_makes_a_result_stale(artifact, caplog):
    save_tuned(result(key_of(artifact)))
    assert find_tuned(key_of(artifact, version="2026.5.0")) is None
    assert "engine version: 2026.4.1 then, 2026.5.0 now" in caplog.text
    assert "normistral tune" in caplog.text


def test_a_mismatch_is_told_in_words(artifact, tmp_path):
    key = key_of(artifact)
    assert find_mismatch(key, key) is None
    assert find_mismatch(key, dataclasses.replace(key, threads=1)) == "threads: 4 then, 1 now"
    assert find_mismatch(key, dataclasses.replace(key, manifest_sha256="1" * 64)) == "the artifact is another one"


def change_document(**changes):
    return lambda raw: json.dumps(json.loads(raw) | changes).encode()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda raw: b"", "damaged"),
        (lambda raw: raw[: len(raw) // 2], "damaged"),
        (lambda raw: b"[" * 10_000, "damaged"),
        (lambda raw: b"\xff" + raw, "damaged"),
        (lambda raw: b"null", "damaged"),
        (lambda raw: raw.replace(b'"512"', b'"511"'), "changed after it was written"),
        (change_document(version=2), "is of version 2, not 1"),
        (change_document(profile="speed"), "damaged"),
        (change_document(rule_s=0), "damaged"),
        (change_document(settings={"a": 1}), "damaged"),
        (lambda raw: raw + b" " * 2**17, "damaged"),
    ],
)
def test_a_damaged_file_is_a_warning(artifact, damage, problem, caplog):
    key = key_of(artifact)
    path = save_tuned(result(key))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=problem):
        read_tuned(path)
    with caplog.at_level(logging.WARNING):
        assert find_tuned(key) is None
    assert problem in caplog.text
    assert [type(stored.content) for stored in list_tuned()] == [str]
    save_tuned(result(key))
    assert find_tuned(key) is not None


def test_a_folder_in_its_place_is_a_warning(artifact, caplog):
    key = key_of(artifact)
    tuned_path(key).mkdir(parents=True)
    assert find_tuned(key) is None
    assert "cannot be used" in caplog.text


def test_forgetting_drops_the_results_of_one_artifact(artifact, tmp_path):
    write_artifact(tmp_path / "annen", context_length=64)
    kept = save_tuned(result(key_of(tmp_path / "annen")))
    dropped = {save_tuned(result(key_of(artifact))), save_tuned(result(key_of(artifact, device="GPU")))}
    assert set(forget_tuned(key_of(artifact).manifest_sha256)) == dropped
    assert [stored.path for stored in list_tuned()] == [kept]
    assert forget_tuned(key_of(artifact).manifest_sha256) == []


def test_a_store_that_cannot_be_written_is_told(artifact):
    store.tuned_dir().parent.mkdir()
    store.tuned_dir().write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match="the result cannot be kept") as caught:
        save_tuned(result(key_of(artifact)))
    assert "NORMISTRAL_HOME" in caught.value.hint


# What would pass something on to the engine that no tuning comes to


def saved_with(key, **changes):
    """A result as somebody else may write it: its checksum is right."""
    return save_tuned(result(key, **changes))


@pytest.mark.parametrize(
    "settings",
    [
        {"CACHE_DIR": "/tmp/x"},
        {"DEVICE_PROPERTIES": "{CPU:{CACHE_DIR:/tmp/x}}"},
        {"INFERENCE_NUM_THREADS": "9"},  # of 8 logical processors
        {"INFERENCE_NUM_THREADS": "0"},
        {"INFERENCE_NUM_THREADS": "-1"},
        {"INFERENCE_NUM_THREADS": "9" * 4000},
        {"INFERENCE_NUM_THREADS": "4\n"},
        {"NUM_STREAMS": "9999"},
        {"INFERENCE_PRECISION_HINT": "f64"},
        {"KV_CACHE_PRECISION": "x"},
        {"prefill_chunk": "4096"},
        {"prefill_chunk": "\u0661\u0662\u0668"},
        {"int4_kernel": "/tmp/x.so"},
        {"accuracy_level": "4"},  # of the other engine
        {"": ""},
    ],
)
def test_settings_that_no_tuning_comes_to_are_a_warning(artifact, settings, caplog):
    key = key_of(artifact)
    saved_with(key, settings=settings, changed=())
    assert find_tuned(key) is None
    assert "is no result of a tuning" in caplog.text
    assert len(caplog.records) == 1
    assert [type(stored.content) for stored in list_tuned()] == [str]


@pytest.mark.parametrize(
    "changes",
    [
        {"changed": ("KV_CACHE_PRECISION",)},
        {"key": {"engine": "another"}},
        {"rule_s": 1e300},
        {"tuned_s": 5e-324},
    ],
)
def test_other_fields_that_cannot_be_are_refused(artifact, changes):
    key = key_of(artifact)
    if "key" in changes:
        changes = {"key": dataclasses.replace(key, **changes["key"])}
    path = saved_with(**{"key": key} | changes)
    with pytest.raises(ValueError, match=r"no result of a tuning|damaged"):
        read_tuned(path)


def test_fields_that_no_result_has_are_refused(artifact):
    path = saved_with(key_of(artifact))
    document = json.loads(path.read_bytes())
    for changed in (document | {"cache_dir": "/tmp"}, document | {"key": document["key"] | {"x": 1}}):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="fields that no result has"):
            read_tuned(path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_a_warning(artifact, kind, caplog):
    """A FIFO among others, which is not waited for; a result is not written through it."""
    key = key_of(artifact)
    path = tuned_path(key)
    path.parent.mkdir(parents=True)
    plant(path, kind)
    before = look(path.parent)
    assert find_tuned(key) is None
    assert "cannot be used" in caplog.text
    assert len(list(list_tuned())) == 1
    with pytest.raises(ResourceError):
        save_tuned(result(key))
    assert look(path.parent) == before


@AS_ROOT
@pytest.mark.parametrize("change", ["owner", "mode"])
def test_a_result_of_somebody_else_is_a_warning(artifact, change, caplog):
    key = key_of(artifact)
    path = save_tuned(result(key))
    if change == "owner":
        os.chown(path, NOBODY, NOBODY)
    else:
        path.chmod(0o666)
    assert find_tuned(key) is None
    assert ("another user" if change == "owner" else "written by others") in caplog.text


def test_forgetting_leaves_folders_alone(artifact):
    path = tuned_path(key_of(artifact))
    path.mkdir(parents=True)
    assert forget_tuned(key_of(artifact).manifest_sha256) == []
    assert path.is_dir()
