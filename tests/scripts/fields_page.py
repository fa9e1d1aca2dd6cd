"""docs/fields.md, made from the tables of the exporter: python tests/scripts/fields_page.py > docs/fields.md."""

from __future__ import annotations

from collections.abc import Mapping

from gguf import Keys

from normistral.export.checkpoint.config_fields import LEFTOVER_PREFIXES
from normistral.export.checkpoint.families import FAMILIES
from normistral.export.checkpoint.families.llama import ROPE_FIELDS
from normistral.export.checkpoint.fields import KnownField
from normistral.export.checkpoint.generation_config import GENERATION_FIELDS
from normistral.export.checkpoint.gguf import GGUF_FIELDS, SAMPLING_PREFIX

_HEAD = """# The fields of a checkpoint, and what becomes of each

Every field of config.json and generation_config.json, and every key of a .gguf file that says something about the
model, is one of three: **used**; **harmless**, because nothing that the model computes depends on it; or **refused**:
the export stops and names it. What is not on this page is refused too, because nobody has looked at what it does. A
field that stands for nothing (null) is always harmless, unless it is used.

`normistral export MODEL --ignore-field NAME` takes a field for harmless; fields inside another are written
`rope_scaling.NAME`. What was ignored stands in the manifest, and `normistral info` shows it beside "verified".

This page is made from the code: `python tests/scripts/fields_page.py > docs/fields.md`.
"""


def render() -> str:
    """The page."""
    page = [_HEAD]
    tables = {family.causal_class.removesuffix("ForCausalLM"): family.fields for family in FAMILIES}
    page.append("## config.json\n\nAlso harmless: names that begin with ")
    page.append(", ".join(f"`{prefix}`" for prefix in LEFTOVER_PREFIXES))
    page.append(" (left by training tools), and those of generation_config.json.\n\n")
    page.append("| field | of | verdict | why |\n|---|---|---|---|\n")
    for name in sorted({name for fields in tables.values() for name in fields}, key=str.lower):
        owners: dict[tuple[str, str], list[str]] = {}
        for family, fields in tables.items():
            if name in fields:
                owners.setdefault((_verdict(fields[name]), fields[name].reason), []).append(family)
        for (verdict, reason), families in owners.items():
            page.append(f"| `{name}` | {', '.join(families)} | {verdict} | {reason} |\n")
    page.append("\n### Inside rope_scaling and rope_parameters\n\n" + _table(ROPE_FIELDS))
    page.append(
        "\nOther types of scaling than these (longrope, ...) and positions that differ between layers are refused.\n"
    )
    page.append("\n## generation_config.json\n\n" + _table(GENERATION_FIELDS))
    page.append("\n## GGUF\n\nKeys outside `llama.`, `tokenizer.` and `general.sampling.` describe the file, and are ")
    page.append("harmless.\n\n")
    page.append(_table(GGUF_FIELDS))
    page.append("\nRefused, of the keys that the package `gguf` knows:\n\n")
    page.append(", ".join(f"`{name}`" for name in model_keys() if name not in GGUF_FIELDS) + ".\n")
    return "".join(page)


def model_keys() -> list[str]:
    """The keys of architecture, tokenizer and sampling that the package `gguf` knows."""
    groups = [vars(group) for group in vars(Keys).values() if isinstance(group, type)]
    names = [value for group in groups for key, value in group.items() if isinstance(value, str) and key.isupper()]
    prefixes = ("{arch}.", "tokenizer.", SAMPLING_PREFIX)
    wanted = {name.replace("{arch}", "llama") for name in names if name.startswith(prefixes)}
    return sorted(name for name in wanted if name != "tokenizer.chat_template.{name}")


def _table(fields: Mapping[str, KnownField]) -> str:
    rows = [f"| `{name}` | {_verdict(fields[name])} | {fields[name].reason} |\n" for name in sorted(fields)]
    return "| field | verdict | why |\n|---|---|---|\n" + "".join(rows)


def _verdict(field: KnownField) -> str:
    if field.is_used:
        return "used"
    return f"harmless at {field.values}; else refused" if field.values else "harmless"


if __name__ == "__main__":
    print(render(), end="")
