"""An artifact is opened once: manifest and files at once, tokenizer and chat template at their first use."""

import dataclasses
import io
import os

import pytest
from sample_artifacts import make_manifest
from scripted_models import make_tokenizer
from tiny_models import TEMPLATE, VOCABULARY

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import MANIFEST_NAME, Template, hash_files, write_manifest
from normistral.errors import ArtifactError, ModelNotFoundError
from normistral.files import sha256_file
from normistral.runtime.engines.settings import EngineConfig
from normistral.server.backends.base import BatchSettings
from normistral.server.ipc import encode_message, read_message, to_worker
from normistral.server.model_handler import ModelHandler


def write(folder, **changes):
    """A folder with a tokenizer and a manifest that fits it."""
    make_tokenizer(folder)
    architecture = dataclasses.replace(make_manifest().architecture, vocabulary=VOCABULARY)
    changes = {
        "architecture": architecture,
        "template": Template(TEMPLATE, "checkpoint", bos_token="<s>", eos_token="<|im_end|>"),
        "files": hash_files(folder),
    } | changes
    write_manifest(folder, make_manifest(**changes))
    return folder


def test_it_is_found_by_path_and_by_its_name_in_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path))
    folder = write(tmp_path / "artifacts" / "sju")
    for name in ("sju", folder, str(folder)):
        assert Artifact.find(name).folder == folder
    assert Artifact.find("sju").name == "sju"
    with pytest.raises(ModelNotFoundError, match="there is no artifact 'åtte'"):
        Artifact.find("åtte")


def test_a_folder_whose_name_is_no_utf_8_has_a_name_that_is(tmp_path):
    folder = write(tmp_path / "sju").rename(tmp_path / "sju\udcff")
    assert Artifact.open(folder).name == "sju\ufffd"
    served = ModelHandler.open(folder, BatchSettings("auto", 0, 100))
    assert served.name == "sju\ufffd"
    payload = read_message(io.BytesIO(encode_message(served.load)))
    received = to_worker.decode(payload)
    assert received.folder == os.fsencode(folder)


def test_files_are_compared_with_the_manifest_unless_it_alone_is_wanted(tmp_path):
    folder = write(tmp_path / "sju")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json has 2 bytes instead of"):
        Artifact.open(folder)
    artifact = Artifact.open(folder, verify=False)
    assert artifact.manifest.role == "chat"
    with pytest.raises(ArtifactError, match="not a valid tokenizer"):
        _ = artifact.tokenizer


def test_tokenizer_and_template_are_read_once(tmp_path):
    artifact = Artifact.open(write(tmp_path / "sju"))
    assert artifact.tokenizer is artifact.tokenizer
    assert artifact.chat_template is artifact.chat_template
    assert artifact.chat_template.encode([{"role": "user", "content": "Hei"}])


def test_a_base_model_has_no_chat_template(tmp_path):
    assert Artifact.open(write(tmp_path / "sju", role="base", template=None)).chat_template is None


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    small = dataclasses.replace(make_manifest().architecture, vocabulary=8)
    folder = write(tmp_path / "sju", architecture=small, stop_token_ids=(2,), bos_token_id=1)
    with pytest.raises(ArtifactError, match=f"the tokenizer of sju has {VOCABULARY} tokens, the model 8"):
        _ = Artifact.open(folder).tokenizer


def test_the_digest_is_that_of_the_file(tmp_path):
    folder = write(tmp_path / "sju")
    assert Artifact.open(folder).manifest_sha256() == sha256_file(folder / MANIFEST_NAME)


@pytest.mark.parametrize(
    ("config", "source"),
    [(EngineConfig(), "rule"), (EngineConfig(tuned={}), "tuned"), (EngineConfig(exact=True, tuned={}), "exact")],
)
def test_a_config_names_the_source_of_its_settings(config, source):
    assert config.settings_source == source
