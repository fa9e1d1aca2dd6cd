"""The requests of EleutherAI's lm-evaluation-harness, answered by a loaded model.

Token for token what the harness's own `hf` model does with the same checkpoint (lm_eval 0.4.13, models/huggingface.py
and api/model.py), so that scores can be compared. It does not import the harness; `lm_eval_model.py` joins the two.

Requests are answered in the order of their token ids: then each shares its longest beginning with the one before it,
and few-shot examples and the question of a multiple choice are computed once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from normistral.errors import UsageError
from normistral.runtime.chunks import Completion
from normistral.runtime.model import Model

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256  # the harness's own, for tasks that name no limit
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one limit; the first one counts

Report = Callable[[int, Any], None]
"""Told the index of each request and its answer, as soon as it is there."""


def ignore(index: int, answer: Any) -> None:
    """A `Report` that does nothing."""


class Harness:
    """Answers the harness's three kinds of requests.

    Args:
        model: stays open; its owner closes it.
        max_length: tokens that the model may look back on; None is its whole context.

    Raises:
        UsageError: `max_length` is no number from 1 to the context length.
    """

    def __init__(self, model: Model, max_length: int | None = None) -> None:
        longest = model.context_length
        if max_length is not None and (type(max_length) is not int or not 1 <= max_length <= longest):
            raise UsageError(
                f"max_length must be from 1 to the context of {model.name}, {longest} tokens, not {max_length!r}"
            )
        self.max_length = longest if max_length is None else max_length
        self._model = model
        manifest = model.manifest
        # Conditions the first token of a text: BOS, or an end of sequence where a model has none.
        self.prefix_id = manifest.stop_token_ids[0] if manifest.bos_token_id is None else manifest.bos_token_id
        self._prefix_text = model.tokenizer.token_text(self.prefix_id)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], report: Report = ignore) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
            pairs: context, which may be empty, and continuation.

        Returns:
            for each pair the continuation's log-probability in nats, and whether greedy decoding would write it.

        Raises:
            UsageError: a continuation that gives no token of its own, or more tokens than fit.
        """
        encoded = [self.encode_pair(context, continuation) for context, continuation in pairs]
        answers: dict[int, tuple[float, bool]] = {}
        for index in _by_prefix([context_ids + continuation_ids for context_ids, continuation_ids in encoded]):
            answers[index] = self._score(*encoded[index])
            report(index, answers[index])
        return [answers[index] for index in range(len(pairs))]

    def loglikelihood_rolling(self, texts: Sequence[str], report: Report = ignore) -> list[float]:
        """Log-probability in nats of each whole text, every token once; 0 for a text without tokens.

        A text longer than `max_length` is cut into windows, the last of which reaches back as far as it can.
        """
        totals = []
        for index, text in enumerate(texts):
            windows = rolling_windows(self.encode(text), self.prefix_id, self.max_length)
            totals.append(sum(self._score(context_ids, token_ids)[0] for context_ids, token_ids in windows))
            report(index, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]], report: Report = ignore) -> list[str]:
        """Generate from each context until one of its stop texts.

        A thinking model's reasoning is not part of the text, but counts towards the limit.

        Args:
            requests: context and generation options: `until`, `max_gen_toks` (or another name of it), `do_sample`, and
                fields of `GenerationConfig`. Greedy unless `do_sample` or a temperature says otherwise.

        Raises:
            UsageError: an option that this model does not have, or a limit that leaves no room for the context.
        """
        prompts = [self.encode(context) or [self.prefix_id] for context, _ in requests]
        answers: dict[int, str] = {}
        for index in _by_prefix(prompts):
            options = generation_options(requests[index][1])
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise UsageError(
                    f"{options['max_new_tokens']} tokens to generate leave no room for a prompt in {self.max_length}",
                    "lower the task's limit with: --gen_kwargs max_gen_toks=N",
                )
            prompt_ids = self._keep_last(prompts[index], room)
            answers[index] = self._text(self._model.generate(prompt_ids, **{"draft": "off"} | options), options["stop"])
            report(index, answers[index])
        return [answers[index] for index in range(len(requests))]

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the artifact's template.

        Without `add_generation_prompt` the text ends where the last message's content does, to be continued.

        Raises:
            UsageError: this is a base model.
            TemplateError: as `ChatTemplate.render`.
        """
        if self._model.chat_template is None:
            raise UsageError(f"{self._model.name} is a base model: it has no chat template", "leave the option out")
        text = self._model.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        final = messages[-1]["content"].strip()
        return text[: text.rindex(final) + len(final)]

    def encode(self, text: str) -> list[int]:
        """Token ids, with the BOS that the tokenizer adds (the manifest's `adds_bos`) unless the text has it."""
        begins = self._prefix_text is not None and text.startswith(self._prefix_text)
        return self._model.tokenizer.encode(text, add_special_tokens=not begins)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context, never empty, and of what follows it.

        Both are tokenised as one text, which is then cut where the context alone would end. Blanks at the end of the
        context go to the continuation, because tokenizers keep a blank and the word behind it together.

        Raises:
            UsageError: nothing is left for the continuation.
        """
        stripped = context.rstrip()
        continuation, context_ids = context[len(stripped) :] + continuation, self.encode(stripped)
        if context == "":
            continuation_ids = self._model.tokenizer.encode(continuation, add_special_tokens=False)
            context_ids = []
        else:
            continuation_ids = self.encode(stripped + continuation)[len(context_ids) :]
        if not context_ids:  # the continuation may bring the prefix itself
            rest = continuation_ids[1:] if continuation_ids[:1] == [self.prefix_id] else continuation_ids
            context_ids, continuation_ids = [self.prefix_id], rest
        if not continuation_ids:
            raise UsageError(f"the continuation {continuation!r} gives no token of its own", "look at the task's data")
        return context_ids, continuation_ids

    def _text(self, completion: Completion, stop: Sequence[str]) -> str:
        """The generated text, decoded by itself as the harness does it: some tokenizers then drop a first blank."""
        manifest, token_ids = self._model.manifest, completion.token_ids
        if manifest.reasoning is not None:
            return completion.text.lstrip()
        ended = bool(token_ids) and token_ids[-1] in manifest.stop_token_ids
        text = self._model.tokenizer.decode(token_ids[:-1] if ended else token_ids)
        for end in stop:
            text = text.partition(end)[0]
        return text

    def _score(self, context_ids: list[int], continuation_ids: list[int]) -> tuple[float, bool]:
        count = len(continuation_ids)
        if count > self.max_length:
            raise UsageError(f"a continuation of {count} tokens does not fit into {self.max_length}")
        # One more than fits, because the last token is scored and never fed.
        token_ids = self._keep_last(context_ids + continuation_ids, self.max_length + 1)
        scores = self._model.score(token_ids, last=count)
        return float(scores.logprobs.sum()), bool(scores.greedy.all())

    def _keep_last(self, token_ids: list[int], room: int) -> list[int]:
        if len(token_ids) > room:
            logger.warning("a request of %d tokens was cut from the left to %d", len(token_ids), room)
        return token_ids[-room:]


def rolling_windows(token_ids: list[int], prefix_id: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a text into contexts and the tokens to score behind each; every token is scored once.

    The first window is conditioned on `prefix_id`, each later one on the one token before it; the last one looks back
    `length` tokens from its end (`get_rolling_token_windows` of the harness with context_len=1).
    """
    for start in range(0, len(token_ids), length):
        end = min(start + length, len(token_ids))
        if start == 0:
            yield [prefix_id], token_ids[:end]
        else:
            yield token_ids[end - length - 1 : start], token_ids[start:end]


def generation_options(task: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `Model.generate` for a task's `generation_kwargs`; names that are not known go through to be refused.

    Raises:
        UsageError: sampling without a temperature, or a limit that is no whole number.
    """
    options = dict(task)
    until = options.pop("until", None)
    limits = [limit for name in _LIMITS if (limit := options.pop(name, None)) is not None]
    temperature = options.pop("temperature", None) or 0.0
    do_sample = options.pop("do_sample", None)
    if do_sample and temperature == 0:
        raise UsageError("do_sample needs a temperature above 0", "add one with: --gen_kwargs temperature=1.0")
    limit = limits[0] if limits else DEFAULT_NEW_TOKENS
    if type(limit) is not int:
        raise UsageError(f"max_gen_toks must be a whole number, not {limit!r}")
    stop = [until] if isinstance(until, str) else until or []
    return options | {
        "max_new_tokens": limit,
        "temperature": 0.0 if do_sample is False else temperature,
        "stop": tuple(text for text in stop if text),
    }


def _by_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
