"""Read a checkpoint's config.json and write it anew from known, checked fields.

Whitelist, not blacklist: whatever is not listed here or in a family's file (`auto_map`,
`_attn_implementation_internal`, anything that a later version of transformers might act on) never reaches the libraries
that load the model. And nothing is dropped in silence: config_fields.py says of every field whether it is used or
without effect, and what it does not know is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError
from normistral.export.checkpoint.config_fields import known_fields
from normistral.export.checkpoint.families import find_family
from normistral.export.checkpoint.fields import (
    AS_PUBLISHED,
    check_fields,
    read_integer,
    read_number,
    read_token_id,
    read_token_ids,
    shorten,
)
from normistral.export.checkpoint.file_kinds import unreadable

_MAX_JSON_BYTES = 256 * 2**20
_MAX_PARAMETERS = 2**40
_MAX_VOCABULARY = 2**22


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {_MAX_JSON_BYTES >> 20} MiB", AS_PUBLISHED)
        raw = path.read_bytes()
        document = json.loads(raw)
        if b"\\ud" in raw.lower():  # half a surrogate pair is no character: nothing could write it again
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}", "check the folder's permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise unreadable(path, f"{path.name} {_why_no_json(exc)}", "download or copy the file again") from exc
    if not isinstance(document, dict):
        raise CheckpointError(f"{path.name} holds a {type(document).__name__}, not an object", AS_PUBLISHED)
    return document


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file in UTF-8; a link in its place is replaced, not followed."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _why_no_json(exc: ValueError | RecursionError) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return f"is not UTF-8 at byte {exc.start}"
    if isinstance(exc, json.JSONDecodeError) and (
        exc.msg.startswith("Unterminated") or exc.pos >= len(exc.doc.rstrip()) - len("null")
    ):
        return f"is not valid JSON: it is cut off after {len(exc.doc)} characters ({exc})"
    return f"is not valid JSON: {'nested too deeply' if isinstance(exc, RecursionError) else exc}"


def sanitise_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that matter, checked, with defaults filled in.

    Raises:
        UnsupportedArchitectureError: not a model this package exports.
        CheckpointError: a field is missing, unknown, of the wrong type, out of range, or contradicts another.
    """
    family = find_family(config)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"the checkpoint is already quantised ({shorten(method)})",
            "export the original checkpoint with its floating-point weights",
        )
    check_fields(config, known_fields(family.fields, config), "config.json")
    vocabulary = read_integer(config, "vocab_size", 1, _MAX_VOCABULARY)
    clean: dict[str, Any] = {"architectures": [family.causal_class], "model_type": family.model_type}
    clean |= {"vocab_size": vocabulary} | family.read_fields(config)
    clean["initializer_range"] = read_number(config, "initializer_range", 0.0, 10.0, 0.02)
    clean["use_cache"] = True
    clean["bos_token_id"] = read_token_id(config, "bos_token_id", vocabulary)
    clean["pad_token_id"] = read_token_id(config, "pad_token_id", vocabulary)
    clean["eos_token_id"] = read_token_ids(config, "eos_token_id", vocabulary, "config.json") or None
    parameters = family.count_parameters(clean)
    if parameters > _MAX_PARAMETERS:
        raise CheckpointError(f"config.json describes {parameters:.3g} parameters", AS_PUBLISHED)
    return clean
