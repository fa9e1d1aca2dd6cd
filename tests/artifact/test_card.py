"""The model card: metadata and figures of the manifest, and nothing of a hostile checkpoint that becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from sample_artifacts import make_manifest, write_artifact

from normistral.artifact.card import CardOptions, card_licence, render_card
from normistral.artifact.extra_files import CARD_NAME, find_foreign_files, is_sealed
from normistral.artifact.manifest import Source
from normistral.artifact.store import remove_artifact
from normistral.cli import main
from normistral.errors import UsageError

INSTRUCT = "norallm/normistral-7b-warm-instruct"


def card_of(options: CardOptions | None = None, name: str = "norsk-int4", **changes: Any) -> str:
    return render_card(make_manifest(**changes), name, options).decode()


def metadata_of(card: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return loaded


def test_metadata_of_a_preset_on_the_hub() -> None:
    card = card_of(source=Source("hub", INSTRUCT, "a" * 40, {}))
    assert metadata_of(card) == {
        "base_model": INSTRUCT,
        "base_model_relation": "quantized",
        "language": ["nb", "nn", "no"],  # and not False
        "library_name": "openvino",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["normistral", "openvino", "int4", "conversational"],
    }
    assert card_licence(card.encode()) == "apache-2.0"


def test_what_nobody_knows_is_not_claimed() -> None:
    """A folder may be called as a preset is, and hold anything."""
    card = card_of(source=Source("folder", "normistral-7b-warm-instruct", None, {}))
    assert not {"base_model", "license", "language"} & metadata_of(card).keys()
    assert "did not name it" in card
    assert card_licence(card.encode()) is None


def test_what_the_publisher_says() -> None:
    source = Source("folder", "mine", None, {})
    named = metadata_of(card_of(CardOptions("me/x", licence="MIT", base_model="other/base"), source=source))
    assert (named["license"], named["base_model"]) == ("mit", "other/base")
    known = metadata_of(card_of(CardOptions("me/x", base_model=INSTRUCT), source=source))
    assert (known["license"], known["language"]) == ("apache-2.0", ["nb", "nn", "no"])
    for wrong in ({"licence": 'MIT"\nx: y'}, {"base_model": "a/b/../c"}, {"base_model": "nothing"}):
        with pytest.raises(UsageError):
            CardOptions(**wrong)


def test_a_published_artifact_is_loaded_from_the_hub() -> None:
    card = card_of(CardOptions("me/tiny"))
    assert 'normistral.load("me/tiny", download=True)' in card
    assert 'folder = snapshot_download("me/tiny")' in card
    assert "normistral chat me/tiny\n" in card


def test_figures_of_the_certificate() -> None:
    quality = {
        "matrices": 225.0,
        "tokenizer_tokens": 20798.0,
        "template_conversations": 4.0,
        "graph_error": 1.5e-6,
        "probe_kl_nats": 0.0448,
        "probe_top1_agreement": 0.9375,
        "probe_tokens": 64.0,
    }
    card = card_of(quality=quality, verified="run")
    for shown in ("225 matrices", "20,798 tokens", "4 conversations", "2e-06", "0.0448 nats", "64 tokens", "94%"):
        assert shown in card
    assert "**failed**" in card_of(verified="failed")
    assert "**not compared**" in card_of(verified="no")
    assert "`rope_magic`" in card_of(ignored_fields=("rope_magic",))


HOSTILE = (
    "x\n---\nlicense: mit\n---\n# Owned",
    "x` <script>alert(1)</script> `y",
    "](https://evil.example) [click](javascript:alert(1))",
    "![](https://evil.example/pixel.png)",
    "\u202egnp.exe\u2066\x1b[31m\x00\u2028# Heading",
    "```\n# out of the fence",
    "<!-- made from normistral.json; SHA-256 of what stands above: " + "0" * 64 + " -->",
    "a|b|c" * 1000,
)


@pytest.mark.parametrize("text", HOSTILE)
def test_fields_of_a_hostile_checkpoint_stay_text(text: str) -> None:
    manifest = make_manifest()
    hostile = replace(
        manifest,
        created=text,
        source=Source("folder", text, text, {}),
        architecture=replace(manifest.architecture, name=text, model_type=text),
        recipe=replace(manifest.recipe, backup=text),
        ignored_fields=(text[:200],),
        tools={text: text},
        notes=(text,),
        verified="run",
    )
    card = render_card(hostile, text).decode()
    assert metadata_of(card) == metadata_of(card_of(source=Source("folder", "x", None, {})))
    assert is_sealed(card.encode())
    body = re.sub(r"^```\w*\n.*?^```$", "", card.split("---\n", 2)[2], flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"`[^`\n]*`", "", body)
    for sign in ("evil", "script", "\u202e", "\x1b", "\x00", "\u2028", "Owned", "# Heading", "out of the fence", "a|b"):
        assert sign not in outside
    assert not {"\u202e", "\u2066", "\x1b", "\x00", "\u2028"} & set(card)
    assert max(map(len, card.splitlines())) < 2000
    assert card.count("\n# ") == 1


def test_a_card_that_somebody_changed_is_theirs(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    manifest = write_artifact(folder)
    card = render_card(manifest, "artifact")
    (folder / CARD_NAME).write_bytes(card)
    assert find_foreign_files(folder) == []
    changes = (card.replace(b"CPUs", b"GPUs"), card + b"more\n", b"# mine\n", card + card[-130:], b"")
    for changed in changes:
        (folder / CARD_NAME).write_bytes(changed)
        assert find_foreign_files(folder) == [CARD_NAME]
    (folder / CARD_NAME).unlink()
    (tmp_path / "elsewhere").write_bytes(card)
    (folder / CARD_NAME).symlink_to(tmp_path / "elsewhere")
    assert find_foreign_files(folder) == [CARD_NAME]
    (folder / CARD_NAME).unlink()
    (folder / CARD_NAME).write_bytes(card)
    (tmp_path / "store").mkdir()
    remove_artifact(folder)
    assert not folder.exists()


def test_info_prints_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_artifact(tmp_path / "norsk")
    assert main(["info", str(tmp_path / "norsk"), "--card"]) == 0
    assert capsys.readouterr().out == render_card(manifest, "norsk").decode()
    assert main(["info", str(tmp_path / "norsk"), "--card", "--json"]) == 2
    (tmp_path / "norsk" / CARD_NAME).write_text("# mine")
    assert main(["info", str(tmp_path / "norsk"), "--check"]) == 0
    assert "README.md was rewritten" in capsys.readouterr().out
