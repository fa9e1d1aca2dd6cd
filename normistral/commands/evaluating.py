"""The command that measures how well an artifact predicts a text."""

from __future__ import annotations

from normistral.commands import console
from normistral.commands.options import (
    Artifact,
    Debug,
    Device,
    EngineSettings,
    EvalReference,
    EvalText,
    Exact,
    JsonFile,
    MaxTokens,
    ReferenceCache,
    Stride,
    Windows,
    WindowTokens,
)
from normistral.runtime.engines.settings import parse_settings


def evaluate(
    artifact: Artifact,
    text: EvalText,
    reference: EvalReference = None,
    windows: Windows = "sliding",
    window_tokens: WindowTokens = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    reference_cache: ReferenceCache = None,
    json_file: JsonFile = None,
    exact: Exact = False,
    device: Device = "CPU",
    engine_settings: EngineSettings = None,
    debug: Debug = False,
) -> None:
    """Measure how well an artifact predicts a text.

    Perplexity; with --reference also KL divergence and top-1 agreement: how far it is from another artifact or from the
    checkpoint. A reference is computed once; a run that was stopped goes on where it was.
    """
    console.require_stdout()
    from normistral.commands.eval import EvalOptions, run_eval

    options = EvalOptions(
        text=text,
        reference=reference,
        windows=windows,
        window_tokens=window_tokens,
        stride=stride,
        max_tokens=max_tokens,
        reference_cache=reference_cache,
        json=json_file,
        exact=exact,
        device=device,
        settings=parse_settings(engine_settings),
    )
    run_eval(artifact, options)
