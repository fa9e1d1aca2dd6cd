"""The structures that one model has been asked for, compiled once each."""

from __future__ import annotations

from functools import lru_cache

from normistral.artifact.manifest import ReasoningMarkers
from normistral.runtime.reasoning import ReasoningSplitter
from normistral.runtime.structured.compile import CompiledStructure, compile_structure
from normistral.runtime.structured.constraint import Constraint, WholePlaces
from normistral.runtime.structured.reasoning import lead_grammar, require_followable
from normistral.runtime.structured.structure import Structure
from normistral.runtime.structured.vocabulary import GrammarVocabulary

_KEPT = 16  # compiled structures, of a few MB each


class Structures:
    """Compiles for one vocabulary; safe to share between threads.

    Args:
        vocabulary: of the model.
    """

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.vocabulary = vocabulary
        self._compile = lru_cache(_KEPT)(self._compile_anew)

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
    ) -> tuple[Constraint | None, WholePlaces | None]:
        """What one text of the model has to keep to from where `splitter` is, and where its answer could end."""
        if structure is None:
            return None, None
        lead = None if markers is None or splitter.keeps_blanks else lead_grammar(markers, splitter.place)
        return Constraint(self._compile(structure, lead)), WholePlaces(self._compile(structure, None))

    def _compile_anew(self, structure: Structure, lead: str | None) -> CompiledStructure:
        return compile_structure(structure, self.vocabulary, lead)
