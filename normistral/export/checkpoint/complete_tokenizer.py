"""The tokenizer as transformers builds it from all its files, and a tokenizer.json that says the same.

tokenizer.json is the truth where there is one, and stays as it is. But transformers also adds tokens that stand only in
the other files, and some of its classes replace a part of it; this package, onnxruntime-genai and openvino_genai read
tokenizer.json alone. So what transformers changes is written into the file, and everything else in it is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError, first_line
from normistral.export.checkpoint.config import read_json, write_json
from normistral.export.checkpoint.file_kinds import recognise, unreadable

TOKENIZER_NAME = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer as transformers loads it; runs no code of the checkpoint and asks no network.

    Raises:
        CheckpointError: transformers cannot load it, or it is none of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # the tokenizers package raises bare Exception for a damaged file, and panics
        raise _blame(folder, exc) from exc
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{_SETTINGS} names the class {type(tokenizer).__name__}, which does not read {TOKENIZER_NAME}",
            "name a class that does, such as PreTrainedTokenizerFast",
        )
    return tokenizer


def complete_tokenizer(folder: Path, reference: Any, notes: list[str]) -> tuple[str, ...]:
    """Write tokenizer.json anew where transformers' tokenizer has more than it, or adds other tokens around a text.

    Args:
        folder: with the checkpoint's tokenizer files.
        reference: its tokenizer in transformers.

    Returns:
        the tokens that stood only in other files.
    """
    import json

    path = folder / TOKENIZER_NAME
    if not path.exists():
        reference.backend_tokenizer.save(str(path))
        notes.append("tokenizer.json was made from tokenizer.model")
        return ()
    given, own = read_json(path), load_backend(path)
    built = json.loads(reference.backend_tokenizer.to_str())
    changed: dict[str, Any] = {}
    added: tuple[str, ...] = ()
    if own.get_added_tokens_decoder() != reference.backend_tokenizer.get_added_tokens_decoder():
        known = {token.content for token in own.get_added_tokens_decoder().values()}
        added = tuple(token["content"] for token in built["added_tokens"] if token["content"] not in known)
        changed["added_tokens"] = [_as_decoded(token, reference.backend_tokenizer) for token in built["added_tokens"]]
        notes.append(_describe_added(added))
    if _around(own) != _around(reference.backend_tokenizer):
        changed["post_processor"] = built["post_processor"]
        notes.append("what tokenizer.json puts around a text is replaced, as transformers' class for it does")
    if _adds_blank(given) != _adds_blank(built):
        changed["pre_tokenizer"] = built["pre_tokenizer"]
        notes.append(f"whether a text begins with a blank follows add_prefix_space of {_SETTINGS}, as in transformers")
    if changed:
        write_json(path, given | changed)
    return added


def load_backend(path: Path) -> Any:
    """A tokenizer.json in the `tokenizers` library.

    Raises:
        CheckpointError: it is damaged.
    """
    from tokenizers import Tokenizer

    read_json(path)  # for its size limit and its clear messages
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # a panic in its Rust code is no Exception
        raise unreadable(
            path, f"{path.name} cannot be read: {first_line(exc)[:160]}", "download or copy the file again"
        ) from exc


def _as_decoded(token: dict[str, Any], backend: Any) -> dict[str, Any]:
    """The token with its flag "special" as the backend behaves: one that was special stays so, whatever is written."""
    is_left_out = not backend.decode([token["id"]]) and backend.decode([token["id"]], skip_special_tokens=False)
    return token | {"special": token["special"] or bool(is_left_out)}


def _describe_added(added: tuple[str, ...]) -> str:
    if not added:
        return f"some added tokens are read as {_SETTINGS} describes them, and not as tokenizer.json does"
    shown = ", ".join(ascii(token)[1:-1][:40] for token in added[:5])
    more = f" and {len(added) - 5} more" if len(added) > 5 else ""
    return f"tokens that stand only beside tokenizer.json were added to it: {shown}{more}"


def _around(backend: Any) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return whole, []


def _adds_blank(tokenizer: dict[str, Any]) -> Any:
    """add_prefix_space of a byte-level pre-tokenizer, the one that transformers' classes overrule."""
    pre_tokenizer = tokenizer.get("pre_tokenizer")
    return pre_tokenizer.get("add_prefix_space") if isinstance(pre_tokenizer, dict) else None


def _blame(folder: Path, exc: BaseException) -> CheckpointError:
    """Why transformers cannot load a tokenizer, and in which file."""
    if not (folder / TOKENIZER_NAME).exists():
        found = recognise(folder / "tokenizer.model")
        if found is not None:
            return CheckpointError(f"tokenizer.model is {found.what}", found.hint)
        return CheckpointError(
            f"tokenizer.model cannot be converted: {first_line(exc)[:160]}",
            "use a checkpoint that has a tokenizer.json",
        )
    load_backend(folder / TOKENIZER_NAME)
    return CheckpointError(
        f"transformers cannot open the tokenizer as {_SETTINGS} describes it: {first_line(exc)[:160]}",
        f"correct {_SETTINGS} and the files beside it; tokenizer.json itself can be read",
    )
