"""Structured output of one model: structures compiled once each, and the tokens that one answer may have next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from normistral.artifact.manifest import ReasoningMarkers
from normistral.errors import UsageError
from normistral.runtime.reasoning import Place, ReasoningSplitter
from normistral.runtime.structured.compile import CompiledStructure, compile_structure
from normistral.runtime.structured.structure import Structure
from normistral.runtime.structured.vocabulary import GrammarVocabulary

_KEPT = 16  # compiled structures, of a few MB each
_BLANKS = (" ", "\n", "\r", "\t")


class Constraint:
    """Which tokens one answer may have next, by its structure.

    Args:
        compiled: may begin with the grammar of a prefix, such as reasoning.
    """

    def __init__(self, compiled: CompiledStructure) -> None:
        self._matcher = compiled.begin()
        self._size = compiled.vocabulary.size
        self._stop_ids = list(compiled.vocabulary.stop_token_ids)

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed_mask(self) -> NDArray[np.bool_]:
        """Of each token [vocabulary] whether it may come next; a stop token may where the answer is whole.

        Raises:
            UsageError: no token may, or it takes too much to find out.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_working()
        allowed = np.unpackbits(packed, count=self._size, bitorder="little").view(np.bool_)
        if not self._matcher.is_accepting():
            allowed[self._stop_ids] = False
        if not allowed.any():
            raise UsageError(
                "the answer can go on with no token of this model that its structure allows",
                "write the structure so that every beginning can be finished",
            )
        return allowed

    def commit(self, token_id: int) -> None:
        """The answer goes on with an allowed token.

        Raises:
            UsageError: it takes too much to follow.
        """
        self._matcher.consume_token(token_id)
        self._require_working()

    def count_accepted(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other."""
        return self._matcher.validate_tokens(list(token_ids))

    def jump_forward_tokens(self) -> list[int]:
        """Tokens that the structure dictates next, as the tokenizer would write them; no stop tokens."""
        token_ids = self._matcher.compute_ff_tokens()
        self._require_working()
        return list(takewhile(lambda token_id: token_id not in self._stop_ids, token_ids))

    def _require_working(self) -> None:
        if self._matcher.is_error():
            raise UsageError(
                "the structure became too complex while the answer was written",
                "bound repetitions more tightly, or describe less with one regular expression",
            )


class AcceptanceMatcher:
    """Reads an answer piece by piece, and tells where it could end.

    Args:
        compiled: of the answer alone.
    """

    def __init__(self, compiled: CompiledStructure) -> None:
        self._matcher = compiled.begin()
        self._engine = compiled.vocabulary.engine

    def advance(self, text: str) -> bool:
        """Read on; whether the text so far is a whole answer."""
        if text:
            self._matcher.try_consume_tokens(self._engine.tokenize_str(text))
        return self._matcher.is_accepting()


class StructureCompiler:
    """Compiles structures for one vocabulary and keeps the latest; safe to share between threads.

    Args:
        vocabulary: of the model.
    """

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.vocabulary = vocabulary
        self._compile = lru_cache(_KEPT)(lambda structure, prefix: compile_structure(structure, vocabulary, prefix))

    def require(self, structure: Structure, markers: ReasoningMarkers | None) -> None:
        """Refuse what this model cannot follow.

        Raises:
            UsageError: as `compile_structure`, or a thinking model's answer could not be told from its reasoning.
        """
        compiled = self._compile(structure, None)
        if markers is not None:
            require_followable(compiled, markers)

    def begin(
        self, structure: Structure | None, markers: ReasoningMarkers | None, splitter: ReasoningSplitter
    ) -> tuple[Constraint | None, AcceptanceMatcher | None]:
        """Constraint of a generation that goes on where `splitter` is, and the matcher of where its answer may end."""
        if structure is None:
            return None, None
        grammar_prefix = None
        if markers is not None and not splitter.keeps_blanks:
            grammar_prefix = reasoning_prefix_grammar(markers, splitter.place)
        return Constraint(self._compile(structure, grammar_prefix)), AcceptanceMatcher(self._compile(structure, None))


def reasoning_prefix_grammar(markers: ReasoningMarkers, place: Place) -> str:
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
