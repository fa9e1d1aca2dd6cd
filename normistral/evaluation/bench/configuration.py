"""A configuration (an artifact with settings), and its measurements: collected over rounds, summed up as figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.errors import UsageError
from normistral.evaluation.bench.results import (
    AnswerResult,
    ConfigurationResult,
    DecodeResult,
    Figures,
    LoadResult,
    MemoryResult,
    PrefillResult,
    Spread,
)
from normistral.evaluation.bench.speed import ConversationPass, Pass, SpeedPlan
from normistral.evaluation.bench.worker import Account, ModelLoaded
from normistral.runtime.engines.settings import DEFAULT_CONFIG, EngineConfig, parse_settings

_THREADS = ("INFERENCE_NUM_THREADS", "intra_op_num_threads")  # OpenVINO's name, onnxruntime's
_WEIGHT_FILES = {"openvino": "openvino_model.", "onnx": "model.onnx"}
_EMBEDDING_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 1}  # an element; scales are a few per cent more
_CACHE_ELEMENT_BYTES = 4  # float32, the most that an engine takes
_PRECISION_BYTES = {"u8": 1, "i8": 1, "f16": 2, "bf16": 2}  # of the KV cache; scales are a few per cent more


@dataclass(frozen=True, slots=True)
class Configuration:
    """One row of the comparison.

    Attributes:
        label: how tables call it.
        engine: how it is loaded.
    """

    label: str
    folder: Path
    manifest: Manifest
    engine: EngineConfig = DEFAULT_CONFIG

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: all but an input embedding that is not the output layer too.

        Of such an embedding a token reads one row.
        """
        format, recipe, shape = self.manifest.format, self.manifest.recipe, self.manifest.architecture
        prefix = _WEIGHT_FILES[format]
        stored = sum(record.size for name, record in self.manifest.files.items() if name.startswith(prefix))
        element = _EMBEDDING_BYTES[recipe.weights]
        if recipe.backup == "fp":  # in OpenVINO as in the checkpoint
            element = 4 if format == "onnx" else 2
        unread = 0 if shape.tied_embeddings else shape.vocabulary * shape.hidden_size * element
        return max(0, stored - unread)

    def least_bytes(self, tokens: int) -> int:
        """Memory without which it cannot run: the weights once, and a KV cache for so many tokens."""
        cached = self.manifest.architecture.kv_values_per_token * _CACHE_ELEMENT_BYTES * tokens
        return self.manifest.total_bytes + cached

    def likely_bytes(self, tokens: int) -> int:
        """Memory it takes at most: the engines keep the mapped file beside weights in an order of their own."""
        return self.least_bytes(tokens) + self.manifest.total_bytes


def read_configurations(arguments: Sequence[str], shared: EngineConfig) -> list[Configuration]:
    """The configurations that a command line names.

    Args:
        arguments: ARTIFACT, or ARTIFACT@KEY=VALUE,KEY=VALUE.
        shared: device and settings of all of them; settings of a single one come first.

    Raises:
        UsageError: settings that cannot be read, or the same configuration twice.
        NormistralError: an artifact is not there, or damaged.
    """
    found: list[Configuration] = []
    for argument in arguments:
        name, settings = split_settings(argument)
        artifact = Artifact.find(name)
        folder, manifest = artifact.folder, artifact.manifest
        label = folder.name + (f"@{_listed(settings)}" if settings else "")
        engine = replace(shared, settings={**shared.settings, **settings})
        added = Configuration(label, folder.absolute(), manifest, engine)
        for other in found:
            if (other.folder.resolve(), other.engine) == (added.folder.resolve(), added.engine):
                raise UsageError(
                    f"{argument} is given twice with the same settings",
                    "add settings to one of them, such as: ARTIFACT@INFERENCE_NUM_THREADS=1",
                )
        found.append(added)
    labels = [configuration.label for configuration in found]
    return [
        replace(configuration, label=argument) if labels.count(configuration.label) > 1 else configuration
        for configuration, argument in zip(found, arguments, strict=True)
    ]


def count_threads(settings: Mapping[str, str], planned: int) -> int:
    """Threads of an engine with these settings; `planned` where they do not say."""
    given = next((settings[name] for name in _THREADS if name in settings), "")
    return int(given) if given.isdigit() and int(given) > 0 else planned


def split_settings(argument: str) -> tuple[str, dict[str, str]]:
    """`name@a=1,b=2` is a name and two settings; an @ without a = behind it belongs to the name."""
    name, at, listed = argument.rpartition("@")
    if not at or "=" not in listed:
        return argument, {}
    return name, parse_settings(listed.split(","))


def _listed(settings: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items())


@dataclass(slots=True)
class Samples:
    """Measurements so far, without warm-ups.

    Attributes:
        loads: (seconds until the process was ready for its first request and had answered it, what it answered).
        problem: why nothing more is measured.
    """

    configuration: Configuration
    loads: list[tuple[float, ModelLoaded]] = field(default_factory=list)
    first_uses: list[float] = field(default_factory=list)
    passes: dict[int, list[Pass]] = field(default_factory=lambda: defaultdict(list))
    conversations: list[ConversationPass] = field(default_factory=list)
    fingerprints: list[str] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    problem: str | None = None

    def threads(self, planned: int) -> int:
        """Threads in use; before loading, those of the given settings."""
        return count_threads(self.loads[-1][1].settings if self.loads else self.configuration.engine.settings, planned)

    def result(self, plan: SpeedPlan, bandwidth_gb_per_s: float | None, planned_threads: int) -> ConfigurationResult:
        """The figures, or the problem."""
        configuration, manifest = self.configuration, self.configuration.manifest
        return ConfigurationResult(
            label=configuration.label,
            artifact=configuration.folder.name,
            format=manifest.format,
            weights=manifest.recipe.weights,
            device=configuration.engine.device,
            exact=configuration.engine.exact,
            given_settings=dict(configuration.engine.settings),
            total_bytes=manifest.total_bytes,
            weight_bytes_per_token=configuration.weight_bytes_per_token,
            context_length=manifest.context_length,
            figures=None if self.problem else self._figures(plan, bandwidth_gb_per_s, planned_threads),
            problem=self.problem,
        )

    def _figures(self, plan: SpeedPlan, bandwidth_gb_per_s: float | None, planned_threads: int) -> Figures:
        loaded = self.loads[-1][1]
        idle_s = sum(account.idle_s for account in self.accounts)
        return Figures(
            engine=loaded.engine,
            basis=loaded.basis,
            threads=self.threads(planned_threads),
            settings=loaded.settings,
            tokens_per_word=loaded.tokens_per_word,
            load=LoadResult(
                ready_s=_spread(ready_s for ready_s, _ in self.loads),
                python_s=_spread(ready_s - one.import_s - one.load_s for ready_s, one in self.loads),
                engine_import_s=_spread(one.import_s for _, one in self.loads),
                model_s=_spread(one.load_s for _, one in self.loads),
            ),
            answers=AnswerResult(
                first_use_s=_spread(self.first_uses),
                question_s=_spread(one.first_ttft_s for one in self.conversations),
                second_turn_s=_spread(one.second_ttft_s for one in self.conversations),
                cached_tokens=self.conversations[-1].cached_tokens,
            ),
            prefill=tuple(self._prefill(length) for length in plan.prefill_lengths),
            decode=tuple(self._decode(context, bandwidth_gb_per_s) for context in plan.decode_contexts),
            memory=MemoryResult(
                peak=_largest(account.memory.peak for account in self.accounts),
                peak_anonymous=_largest(account.peak_anonymous for account in self.accounts),
                at_end=self.accounts[-1].memory,
            ),
            output_sha256=tuple(sorted(set(self.fingerprints))),
            energy=loaded.energy,
            idle_cpu_share=sum(account.idle_cpu_s for account in self.accounts) / idle_s if idle_s else 0.0,
        )

    def _prefill(self, length: int) -> PrefillResult:
        passes = self.passes[length]
        return PrefillResult(
            length,
            _spread(one.prefill_tokens / one.prefill_s for one in passes),
            _per_joule(passes, lambda one: (one.prefill_tokens, one.prefill_joules)),
        )

    def _decode(self, context: int, bandwidth_gb_per_s: float | None) -> DecodeResult:
        steady = [one for one in self.passes[context] if one.steady]
        passes = steady or self.passes[context]
        speed = _spread(one.decode_tokens / one.decode_s for one in passes)
        weights = self.configuration.weight_bytes_per_token
        cached = self._cache_bytes_per_token() * (context + passes[0].decode_tokens / 2)
        around = [sum(one.bandwidth_gb_per_s) / 2 for one in passes if one.bandwidth_gb_per_s]
        ceilings = around or ([bandwidth_gb_per_s] * len(passes) if bandwidth_gb_per_s else [])
        read_gb = (weights + cached) / 1e9
        shares = Spread.of(
            one.decode_tokens / one.decode_s * read_gb / ceiling for one, ceiling in zip(passes, ceilings, strict=False)
        )
        return DecodeResult(
            context,
            speed,
            speed.median * weights / 1e9,
            shares.median if shares else None,
            _per_joule(passes, lambda one: (one.decode_tokens, one.decode_joules)),
            Spread.of(around),
            sum(one.dropped + (not one.steady) for one in self.passes[context]),
        )

    def _cache_bytes_per_token(self) -> int:
        precision = self.loads[-1][1].settings.get("KV_CACHE_PRECISION", "")
        element = _PRECISION_BYTES.get(precision, _CACHE_ELEMENT_BYTES)
        return self.configuration.manifest.architecture.kv_values_per_token * element


def _spread(values: Iterable[float]) -> Spread:
    spread = Spread.of(values)
    assert spread is not None, "every kind is measured in every round"
    return spread


def _per_joule(passes: Iterable[Pass], read: Callable[[Pass], tuple[int, float | None]]) -> Spread | None:
    """Tokens for a joule; a pass shorter than the counter's step, which then stands still, does not count."""
    return Spread.of(tokens / joules for tokens, joules in map(read, passes) if joules)


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
