"""The inputs of one export, as every stage of the pipeline reads them."""

from __future__ import annotations

from dataclasses import dataclass

from normistral.export.checkpoint.open import Checkpoint
from normistral.export.recipe import Recipe, choose_context, choose_group_size
from normistral.export.reference.model import PROBE_TEXT
from normistral.export.staging import Staging
from normistral.progress import Progress


@dataclass(frozen=True, slots=True)
class ExportJob:
    """One export: a checkpoint, a recipe whose open choices are settled, and where to write.

    Attributes:
        group_size: weights that share one scale; -1 is one scale per output channel, None is weights without groups.
        context_length: most tokens of prompt and answer together in the artifact.
        probe_ids: token ids of the probe text, at most `context_length`; the verification runs them.
        staging: folders for the artifact and for temporary files.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    group_size: int | None
    context_length: int
    probe_ids: list[int]
    staging: Staging
    progress: Progress

    @classmethod
    def settle(cls, checkpoint: Checkpoint, recipe: Recipe, staging: Staging, progress: Progress) -> ExportJob:
        """Settle what the recipe leaves to the model: group size and context.

        Raises:
            UsageError: the recipe asks for a group size or a context that this model does not have.
        """
        group_size = choose_group_size(checkpoint.architecture, recipe)
        context = choose_context(checkpoint.architecture, checkpoint.context_length, recipe)
        probe_ids = list(checkpoint.tokenizer(PROBE_TEXT)["input_ids"])[:context]
        return cls(checkpoint, recipe, group_size, context, probe_ids, staging, progress)
