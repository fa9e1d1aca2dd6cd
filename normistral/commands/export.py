"""`normistral export`: makes an artifact of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normistral.artifact import store
from normistral.artifact.manifest import ArtifactFormat, GraphKind
from normistral.artifact.presets import WeightFormat
from normistral.commands import console
from normistral.commands.options import Debug, Verbose, complete_preset, given
from normistral.commands.progress import show_progress
from normistral.export.recipe import FUSED_CONTEXT, GROUP_SIZES, PER_CHANNEL, FallbackDtype, Recipe, RecipeName

_RECIPE = Recipe()


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A preset, a hub id, a folder, or a .gguf file.",
            show_default=False,
            autocompletion=complete_preset,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="[OUTPUT]", help="The folder to make; default: named after MODEL, in the local store."),
    ] = None,
    format: Annotated[ArtifactFormat, typer.Option(help="Format of the artifact.")] = _RECIPE.format,
    weights: Annotated[WeightFormat, typer.Option(help="Weights; fp32 is for ONNX only.")] = _RECIPE.weights,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="How int4 and int8 are rounded: fast (to nearest), balanced (scales searched on our texts) or best "
            "(GPTQ as well, and zero points at int4; takes longest). Default: best for int4, fast for int8."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help=f"Weights that share one scale, in int4 and int8: {', '.join(map(str, GROUP_SIZES))}, or "
            f"{PER_CHANNEL} for one per channel (not in ONNX). Default: the largest that divides the model's widths; "
            f"for int8 in OpenVINO {PER_CHANNEL}."
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Round int4 and int8 to a grid around zero, without zero points. Default: symmetric, but for int4 "
            "with the recipe best.",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the layers' weights in int4. The most sensitive take 8 bits with the recipes balanced and "
            f"best, and --backup with fast (not in ONNX). Default: {_RECIPE.ratio:g}."
        ),
    ] = None,
    backup: Annotated[
        FallbackDtype | None,
        typer.Option(help=f"Layers that are not int4: int8_asym, int8_sym or fp. Default: {_RECIPE.backup}."),
    ] = None,
    output_layer_bits: Annotated[
        int | None,
        typer.Option(help=f"Output layer in 8 bits (--backup) or in 4. Default: {_RECIPE.output_layer_bits}."),
    ] = None,
    graph: Annotated[
        GraphKind | None,
        typer.Option(
            help="ONNX graph: fused (onnxruntime's own operators) or plain (the standard's, for fp16 and fp32). "
            "Default: fused for int4 and int8, else plain."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most tokens that prompt and answer may take. Default: the checkpoint's, in a fused graph at most "
            f"{FUSED_CONTEXT}.",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A chat template in jinja that takes the place of the checkpoint's; a base model becomes one that "
            "chats. Stop tokens follow from it too.",
        ),
    ] = None,
    ignore_field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Take a field of config.json or generation_config.json, or a key of a .gguf file, for one without "
            "effect; may be repeated. The manifest names it.",
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not prove that it is still the same model; the manifest says so.")
    ] = False,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Keep an artifact that fails this proof as OUTPUT.failed.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Do not go on with the layers that an interrupted export to OUTPUT kept.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUTPUT if it is an artifact, once the new one is whole.")
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a model ready to run here, from its published files. Prints the artifact's folder on stdout.

    Needs the extra "export": pip install "normistral[export]"; for ONNX also "onnx": "normistral[export,onnx]".
    """
    console.require_stdout()
    from normistral.export.pipeline import export_model

    options = given(
        recipe=recipe,
        group_size=group_size,
        symmetric=symmetric,
        ratio=ratio,
        backup=backup,
        output_layer_bits=output_layer_bits,
        graph=graph,
        context_length=context,
    )
    folder = store.default_output(model, weights, format) if output is None else output
    with show_progress() as progress:
        export_model(
            model,
            folder,
            format,
            weights,
            force=force,
            revision=revision,
            chat_template=chat_template,
            ignore_fields=tuple(ignore_field or ()),
            verify=not no_verify,
            keep_failed=keep_failed,
            restart=restart,
            progress=progress,
            **options,
        )
    print(folder, flush=True)
