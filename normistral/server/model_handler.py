"""Model of a server without its engine: prompt to token ids, resolution and limits of options."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from normistral.artifact.artifact import Artifact
from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import Manifest
from normistral.artifact.taint import strings_in
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ContextLengthError, UsageError
from normistral.files import replace_undecodable
from normistral.runtime.detokenizer import spell_vocabulary
from normistral.runtime.engines.settings import DEFAULT_CONFIG, EngineConfig
from normistral.runtime.options import GenerationConfig, encode_breakers, require_applicable, resolve_options
from normistral.runtime.overflow import LeftOut, Overflow, answer_room, fit_conversation
from normistral.runtime.structured.constraint import StructureCompiler
from normistral.runtime.structured.vocabulary import GrammarVocabulary
from normistral.server.backends.base import BatchSettings, cache_token_bytes
from normistral.server.ipc import Load

_PROBES = (2, 8)  # characters for each token of the context; Norwegian and English have 3 to 5
_MOST_CHARACTERS = 32  # for each token of the context; runs of one character can have more
_WEIGHTS_SHARE = 1.1  # in memory, of the files' size (benchmarks/results/2026-11-29-load.md)
_PROCESS_BYTES = 320 * 2**20  # interpreter, engine and its buffers; the demo's worker takes 320 MiB beside its weights
_UNSETTLED = 256  # tokens at the end of a beginning that what follows may change


@dataclass(frozen=True)
class ModelHandler:
    """Served artifact: manifest, tokenizer, template, limits.

    Attributes:
        name: of the model, in requests.
        context_length: the most tokens that prompt and answer may take together here.
        new_tokens: the most of an answer.
        load: how its worker loads it.
    """

    name: str
    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    context_length: int
    new_tokens: int
    load: Load
    template: ChatTemplate | None = field(default=None)

    @classmethod
    def open(
        cls,
        artifact: str | Path,
        batch: BatchSettings,
        new_tokens: int | None = None,
        *,
        name: str | None = None,
        config: EngineConfig = DEFAULT_CONFIG,
    ) -> ModelHandler:
        """Read tokenizer, template and manifest of an artifact; errors as `normistral.load`.

        Args:
            batch: its `context` is what the server allows.
            new_tokens: the most of an answer; None is as many as fit.
        """
        opened = Artifact.find(artifact)
        opened.warn_of_advice()
        folder, manifest = opened.folder, opened.manifest
        load = Load(os.fsencode(folder.resolve()), config, batch, manifest.sha256)
        context = min(batch.context, manifest.context_length)
        most = context - 1 if new_tokens is None else min(new_tokens, context - 1)
        return cls(
            name or replace_undecodable(folder.resolve().name),
            folder,
            manifest,
            opened.tokenizer,
            context,
            most,
            load,
            opened.chat_template,
        )

    @property
    def memory_bytes(self) -> int:
        """The most that its worker process takes: weights, KV caches, interpreter and engine."""
        prefix_tokens = sum(len(prefix.token_ids) for prefix in self.load.prefixes)
        cache_bytes = self.load.batch.cache_bytes + prefix_tokens * cache_token_bytes(self.manifest)
        return model_memory_bytes(self.manifest, cache_bytes)

    def fingerprint(self, arithmetic: str) -> str:
        """Hash of weights and arithmetic, for `system_fingerprint`."""
        files = sorted((name, record.sha256) for name, record in self.manifest.files.items())
        text = repr((files, self.load.config.exact, arithmetic))
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """UTF-8 bytes of each token."""
        return spell_vocabulary(self.tokenizer, self.manifest.architecture.vocabulary)

    @cached_property
    def structures(self) -> StructureCompiler:
        """Compiler that validates requested structures."""
        vocabulary = self.manifest.architecture.vocabulary
        return StructureCompiler(GrammarVocabulary(self.tokenizer, vocabulary, self.manifest.stop_token_ids))

    def require_template(self) -> ChatTemplate:
        """The chat template; raises UsageError for a base model."""
        if self.template is None:
            raise UsageError(f"{self.name} is a base model and knows no conversation", "use /v1/completions")
        return self.template

    def fit_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        overflow: Overflow,
        options: dict[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
        **how: bool,
    ) -> tuple[list[int], LeftOut | None]:
        """Token ids of a conversation, and what the policy left out of it.

        Args:
            options: of the request; they say how much room the answer may need.
            tools, how: as `ChatTemplate.encode` takes them.

        Raises:
            UsageError: this is a base model, or the text is not valid Unicode.
            TemplateError: the template refuses the messages.
            ContextLengthError: they leave no room for an answer.
        """
        template = self.require_template()
        if overflow == "error":
            self._require_possible("".join((*strings_in(messages), *strings_in(tools))))
            return self._fitting(template.encode(messages, tools=tools, **how)), None
        most = min(resolve_options(self.manifest.sampling, options).max_new_tokens, self.new_tokens)
        limit = self.context_length - answer_room(self.context_length, most)
        fitted = fit_conversation(
            messages, lambda part: template.encode(part, tools=tools, **how), self.tokenizer, overflow, limit
        )
        return self._fitting(fitted.prompt_ids), fitted.left_out

    def encode_text(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt for completion.

        Raises:
            UsageError: it is empty, not valid Unicode, or holds ids outside the vocabulary.
            ContextLengthError: it leaves no room for an answer.
        """
        if isinstance(prompt, str):
            self._require_possible(prompt)
            prompt_ids = self.tokenizer.encode(prompt)
        else:
            prompt_ids = list(prompt)
        vocabulary = self.manifest.architecture.vocabulary
        if any(not 0 <= token_id < vocabulary for token_id in prompt_ids):
            raise UsageError("the prompt holds a token id outside the vocabulary", f"ids go from 0 to {vocabulary - 1}")
        if not prompt or not prompt_ids:
            raise UsageError("the prompt is empty", "give it some text")
        return self._fitting(prompt_ids)

    def resolve(self, options: dict[str, Any], prompt_tokens: int) -> GenerationConfig:
        """Options of a request over the model's defaults over ours, within the server's limits.

        Raises:
            UsageError: a value out of range, an option that means nothing to this model, or a structure that cannot be
                compiled.
        """
        config = resolve_options(self.manifest.sampling, options)
        room = min(config.max_new_tokens, self.new_tokens, self.context_length - prompt_tokens)
        config = resolve_options(self.manifest.sampling, options | {"max_new_tokens": room})
        require_applicable(config, self.manifest, self.name)
        if config.structure is not None:
            self.structures.require(config.structure, self.manifest.reasoning)
        return encode_breakers(config, self.tokenizer)

    def _require_possible(self, text: str) -> None:
        """Refuse a text that is far too long after tokenizing a prefix of it.

        A text goes on from the tokens of its beginning, but for the last few of those. Tokenizers take half a second
        to two seconds for a megabyte, whatever it holds, so there is an end to what they are given.
        """
        too_long = ContextLengthError(
            f"{len(text)} characters are more than the {self.context_length} tokens for which {self.name} has room, "
            "answer included",
            "shorten it",
        )
        if len(text) > _MOST_CHARACTERS * self.context_length:
            raise too_long
        for factor in _PROBES:
            characters = factor * self.context_length
            if len(text) <= characters:
                return
            if (
                len(self.tokenizer.encode(text[:characters], add_special_tokens=False))
                > self.context_length + _UNSETTLED
            ):
                raise too_long

    def _fitting(self, prompt_ids: list[int]) -> list[int]:
        if len(prompt_ids) >= self.context_length:
            raise ContextLengthError(
                f"the prompt takes {len(prompt_ids)} tokens; {self.name} has room for {self.context_length}, "
                "answer included",
                "shorten it",
            )
        return prompt_ids


def model_memory_bytes(manifest: Manifest, cache_bytes: int) -> int:
    """The most that a worker process takes: weights, KV caches, interpreter and engine."""
    return int(_WEIGHTS_SHARE * manifest.total_bytes) + cache_bytes + _PROCESS_BYTES
