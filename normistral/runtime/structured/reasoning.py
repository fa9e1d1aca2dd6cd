"""The grammar of what a thinking model writes before a structured answer."""

from __future__ import annotations

import json

from normistral.artifact.manifest import ReasoningMarkers
from normistral.errors import UsageError
from normistral.runtime.reasoning import Place
from normistral.runtime.structured.compile import CompiledStructure

_BLANKS = (" ", "\n", "\r", "\t")


def lead_grammar(markers: ReasoningMarkers, place: Place) -> str:
    """Lark of reasoning, some blanks and the answer, for a text that goes on at `place`.

    At the start the model may reason or answer at once. Tags that are tokens are these tokens, others text.
    """
    if markers.open_id is None:
        opening, reasoning = json.dumps(markers.open), f"thought[suffix={json.dumps(markers.close)}]: /(.|\\n)*/"
        closed = "thought BLANKS?"
    else:
        opening, reasoning = f"<[{markers.open_id}]>", "thought: /(.|\\n)*/"
        closed = f"thought <[{markers.close_id}]> BLANKS?"
    start = {"start": f"({opening} {closed})?", "reasoning": closed, "answer": "BLANKS?"}[place]
    return f"start: {start} @answer\n{reasoning}\nBLANKS: /[ \\t\\r\\n]{{1,4}}/"


def require_followable(compiled: CompiledStructure, markers: ReasoningMarkers) -> None:
    """Refuse an answer that could not be told from what comes before it.

    Raises:
        UsageError: it may begin with a blank or, where that is text, with the tag that opens the reasoning.
    """
    beginnings = (*_BLANKS, markers.open) if markers.open_id is None else _BLANKS
    for text in beginnings:
        if compiled.may_begin_with(text):
            raise UsageError(
                f"behind reasoning an answer cannot begin with {text!r}, as this structure allows",
                "write the structure so that it begins with something else",
            )
