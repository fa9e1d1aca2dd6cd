"""The tokenizer and detokenizer as OpenVINO models, for openvino_genai and others without the `tokenizers` package.

Our own runtime does not use them: it reads tokenizer.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normistral.errors import ExportError
from normistral.export.openvino import write_ir

TOKENIZER_NAME = "openvino_tokenizer.xml"
DETOKENIZER_NAME = "openvino_detokenizer.xml"


def save_tokenizer_ir(tokenizer: Any, folder: Path, template: str | None) -> None:
    """Write tokenizer and detokenizer, with the chat template where openvino_genai looks for it.

    Padding and truncation go to the left, as Optimum sets them for text generation.

    Args:
        template: jinja2 source, or None for a base model.

    Raises:
        ExportError: openvino_tokenizers does not support this tokenizer.
        ResourceError: the disk is full.
    """
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino.utils import set_simplified_chat_template

    tokenizer.padding_side = tokenizer.truncation_side = "left"
    try:
        encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as exc:  # it raises many kinds, its own and bare ones
        raise ExportError(f"the tokenizer cannot be converted to OpenVINO: {exc}".splitlines()[0]) from exc
    if template is not None:
        encoder.set_rt_info(template, "chat_template")
        set_simplified_chat_template(encoder)
    write_ir(encoder, folder / TOKENIZER_NAME)
    write_ir(decoder, folder / DETOKENIZER_NAME)


def tokenizer_ir_differs(tokenizer: Any, folder: Path, text: str) -> bool:
    """Whether the OpenVINO tokenizer gives other ids for `text` than the checkpoint's own."""
    import openvino
    import openvino_tokenizers  # noqa: F401  (its import registers the operations)

    encode = openvino.Core().compile_model(folder / TOKENIZER_NAME, "CPU")
    ids: list[int] = encode([text])["input_ids"][0].tolist()
    return ids != list(tokenizer(text)["input_ids"])
