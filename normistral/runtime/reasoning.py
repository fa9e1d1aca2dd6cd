"""The reasoning of a thinking model, told apart from its answer.

Such a model writes ` <think> reasoning</think> answer`. Where both tags are tokens of the vocabulary, these tokens are
tags and nothing else is: the same letters spelled with ordinary tokens stay text. Otherwise tags are found in the text.

- An open tag at the beginning, after blanks at most, begins the reasoning; the first close tag ends it.
- An open tag inside the reasoning is text of the reasoning.
- A prompt that ends inside the reasoning, or behind it, is where the text goes on.
- A close tag at the beginning ends a reasoning that was never opened, and is dropped. Text in front of it would be
  reasoning too; but it was shown as answer before that could be known, so it stays answer.
- Inside the answer, an open tag that is a token begins reasoning again, and a close tag that is one is dropped; tags
  found in the text are text there, because an answer may speak of them.
- Reasoning does not begin with blanks, nor does an answer behind reasoning. An answer without reasoning is left alone.

It does not know engines or tokens' texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from normistral.artifact.manifest import ReasoningMarkers
from normistral.artifact.tokenizer import Tokenizer
from normistral.runtime.stopping import overlap

Place = Literal["start", "reasoning", "answer"]


class ReasoningSplitter:
    """Splits one generation; text that may be part of a tag is held back until it is certain.

    Args:
        markers: the model's tags; None takes everything for the answer.
        place: where the text begins; "start" is where an open tag may come.
        begun: the prompt holds some of that reasoning or answer already, so blanks belong to it.
    """

    def __init__(self, markers: ReasoningMarkers | None, place: Place = "start", *, begun: bool = False) -> None:
        self._place: Place = "answer" if markers is None else place
        self._begun: set[Place] = {self._place} if begun or markers is None else set()
        self._markers = markers
        self._tags_are_tokens = markers is not None and markers.open_id is not None
        self._held = ""

    @classmethod
    def after_prompt(
        cls, markers: ReasoningMarkers | None, tokenizer: Tokenizer, prompt_ids: Sequence[int]
    ) -> ReasoningSplitter:
        """For what follows a prompt.

        A tag that is a token counts if no special token follows it. One found in the text has to be the prompt's very
        end, blanks aside: it could as well come from a message.
        """
        if markers is None:
            return cls(None)
        if markers.open_id is None:
            text = tokenizer.decode(prompt_ids, skip_special_tokens=False).rstrip()
            return cls(
                markers,
                "reasoning" if text.endswith(markers.open) else "answer" if text.endswith(markers.close) else "start",
            )
        for position in reversed(range(len(prompt_ids))):
            token_id = prompt_ids[position]
            if token_id in (markers.open_id, markers.close_id):
                begun = tokenizer.decode(prompt_ids[position + 1 :]).strip() != ""
                return cls(markers, "reasoning" if token_id == markers.open_id else "answer", begun=begun)
            if tokenizer.is_special(token_id):
                break
        return cls(markers)

    @property
    def place(self) -> Place:
        """Where the text so far ends."""
        return self._place

    @property
    def keeps_blanks(self) -> bool:
        """Whether blanks that come now are text."""
        return self._markers is None or self._place in self._begun

    @property
    def inside(self) -> bool:
        """Whether the text so far ends inside the reasoning."""
        return self._place == "reasoning"

    def is_tag(self, token_id: int | None) -> bool:
        """Whether this token is a tag and no text."""
        markers = self._markers
        return markers is not None and token_id is not None and token_id in (markers.open_id, markers.close_id)

    def push(self, token_id: int | None, text: str) -> tuple[str, str]:
        """Add a token; returns what is certain now of the reasoning and of the answer.

        Args:
            token_id: None adds only text.
            text: what became certain with this token; for a tag what stands before it.
        """
        reasoning, answer = self._split(text)
        if self._markers is not None and self.is_tag(token_id):
            reasoning += self._cross(self._markers, opens=token_id == self._markers.open_id)
        return reasoning, answer

    def flush(self) -> tuple[str, str]:
        """Text held back, once the generation has ended."""
        held, self._held = self._held, ""
        return (self._begin("reasoning", held), "") if self.inside else ("", held)

    def _cross(self, markers: ReasoningMarkers, *, opens: bool) -> str:
        """Pass a tag that is a token; returns the reasoning that it is."""
        if opens and self.inside:
            return self._begin("reasoning", markers.open)
        self._held = ""  # blanks of the start
        self._place = "reasoning" if opens else "answer"
        return ""

    def _split(self, text: str) -> tuple[str, str]:
        reasoning = answer = ""
        self._held += text
        if self._place == "start":
            self._leave_start()
        if self._place == "reasoning":
            reasoning = self._begin("reasoning", self._take_reasoning())
        if self._place == "answer":
            answer, self._held = self._begin("answer", self._held), ""
        return reasoning, answer

    def _leave_start(self) -> None:
        """Decide what the text begins with, as soon as that can be told."""
        leads_to: dict[str, Place] = {}
        if self._markers is not None and not self._tags_are_tokens:
            leads_to = {self._markers.open: "reasoning", self._markers.close: "answer"}
        text = self._held.lstrip()
        for tag, place in leads_to.items():
            if text.startswith(tag):
                self._place, self._held = place, text[len(tag) :]
                return
        if text and not any(tag.startswith(text) for tag in leads_to):
            self._place = "answer"
            self._begun.add("answer")

    def _take_reasoning(self) -> str:
        """Held text up to the close tag, or up to a possible beginning of it."""
        if self._markers is None or self._tags_are_tokens:
            taken, self._held = self._held, ""
            return taken
        close = self._markers.close
        taken, found, rest = self._held.partition(close)
        if found:
            self._place, self._held = "answer", rest
            return taken
        cut = len(taken) - overlap(taken, close)
        self._held = taken[cut:]
        return taken[:cut]

    def _begin(self, place: Place, text: str) -> str:
        """`text` of this place without the blanks that it does not begin with."""
        if place in self._begun:
            return text
        text = text.lstrip()
        if text:
            self._begun.add(place)
        return text


class ReasoningBudget:
    """Closes the reasoning after so many tokens.

    Args:
        most: tokens between the tags, in all; None is no limit.
        close_ids: token ids that write the close tag.
        forced: they are put here when it is time.
        may_close: whether they may come now; a structure has the text end with a whole character.
    """

    def __init__(
        self,
        most: int | None,
        close_ids: Sequence[int],
        forced: deque[int],
        may_close: Callable[[], bool] = lambda: True,
    ) -> None:
        self._most, self._close_ids, self._forced, self._may_close = most, close_ids, forced, may_close
        self._spent = 0
        self._inside = self._closing = False

    def watch(self, *, inside: bool) -> bool:
        """Say before the first token, and after every one, whether the text is inside; True if that ends now."""
        if inside and self._inside and not self._closing:
            self._spent += 1
        self._inside = inside
        self._closing = self._closing and inside
        if self._most is None or not inside or self._closing or self._spent < self._most or not self._may_close():
            return False
        self._closing = True
        self._forced.extend(self._close_ids)
        return True


def encode_close_tag(markers: ReasoningMarkers | None, tokenizer: Tokenizer) -> Sequence[int]:
    """Token ids that write the close tag; none for a model without reasoning."""
    if markers is None:
        return ()
    if markers.close_id is not None:
        return (markers.close_id,)
    return tokenizer.encode(markers.close, add_special_tokens=False)
