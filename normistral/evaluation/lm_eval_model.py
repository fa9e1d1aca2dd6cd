"""The model "normistral" of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from normistral.errors import UsageError
from normistral.evaluation.harness import Harness, Report
from normistral.runtime.loading import load

_ARGUMENTS = ("artifact", "exact", "device", "max_length")
_HARNESS_DEVICE = "cuda:0"  # what the harness hands over when nobody gave a device


class NormistralLM(LM):  # type: ignore[misc]  # lm_eval is not installed where types are checked
    """An artifact, as the harness wants to see models.

    Args:
        artifact: a folder, or a name in the local store.
        exact: reference arithmetic, as in `normistral.load`.
        device: as in `normistral.load`.
        max_length: tokens that the model may look back on; None is its whole context.
        batch_size: 1 or "auto", which is 1: an engine runs one sequence.
        max_batch_size: None.

    Raises:
        UsageError: a value of the wrong kind.
        NormistralError: as `normistral.load`.
    """

    def __init__(
        self,
        artifact: str,
        exact: bool = False,
        device: str = "CPU",
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if type(exact) is not bool:
            raise UsageError(f"exact must be true or false, not {exact!r}", "leave it out for false")
        if str(batch_size) not in ("1", "auto") or max_batch_size is not None:
            raise UsageError("requests are answered one at a time", "leave --batch_size and --max_batch_size out")
        self.model = load(str(artifact), device, exact=exact)
        self.harness = Harness(self.model, max_length)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """From the text of --model_args."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From --model_args, and from the options that the harness has for every model.

        Raises:
            UsageError: no artifact, an unknown argument, or a --device.
        """
        if unknown := sorted(arg_dict.keys() - set(_ARGUMENTS)):
            raise UsageError(f"unknown argument {', '.join(unknown)}", f"--model_args takes {', '.join(_ARGUMENTS)}")
        if "artifact" not in arg_dict:
            raise UsageError("no artifact was given", "add one with: --model_args artifact=PATH")
        config = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if (device := config.pop("device", _HARNESS_DEVICE)) != _HARNESS_DEVICE:
            raise UsageError(f"--device {device} is not for this model", "use --model_args artifact=PATH,device=NAME")
        return cls(**arg_dict, **config)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) its log-probability in nats and whether it is the greedy one."""
        return self._answer("loglikelihood", self.harness.loglikelihood, [r.args for r in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,) its log-probability in nats."""
        rolling = self.harness.loglikelihood_rolling
        arguments = [r.args for r in requests]

        def answer(texts: list[tuple[str]], report: Report) -> list[float]:
            return rolling([text for (text,) in texts], report)

        return self._answer("loglikelihood_rolling", answer, arguments, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, generation options) the text that follows."""
        return self._answer("generate_until", self.harness.generate_until, [r.args for r in requests], disable_tqdm)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text."""
        return self.harness.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the template in use, for the harness's log."""
        if isinstance(chat_template, str):
            raise UsageError("an artifact has one chat template", "give --apply_chat_template without a name")
        template = self.model.manifest.template
        return None if not chat_template or template is None else template.text

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's request caches apart."""
        return self.model.manifest.files["tokenizer.json"].sha256

    def get_model_info(self) -> dict[str, Any]:
        """Model and engine, for the results of the harness."""
        manifest, engine = self.model.manifest, self.model.capabilities
        return {
            "model_num_parameters": manifest.architecture.parameters,
            "model_dtype": manifest.recipe.weights,
            "model_source": manifest.source.id,
            "model_revision": manifest.source.revision,
            "model_format": manifest.format,
            "device": engine.device,
            "engine_settings": engine.settings,
        }

    def _answer(
        self, kind: str, answer: Callable[[list[Any], Report], list[Any]], arguments: list[Any], disable_tqdm: bool
    ) -> list[Any]:
        with tqdm(total=len(arguments), desc=kind, disable=disable_tqdm) as bar:

            def report(index: int, result: Any) -> None:
                bar.update(1)
                self.cache_hook.add_partial(kind, arguments[index], result)  # what --use_cache resumes from

            return answer(arguments, report)


def register() -> None:
    """Let `lm_eval.simple_evaluate` and the command line find it."""
    import lm_eval.models  # noqa: F401  # its own models, which the harness only adds to an empty registry

    register_model("normistral")(NormistralLM)
