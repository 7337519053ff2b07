"""A whole run that trains a prior over codes, as one frozen value: prior, codes, training, mesh, output."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ConfigError
from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.visual_tokenizers.priors.options import GPTConfig


@dataclasses.dataclass(frozen=True)
class PriorInit:
    """What a run starts from. checkpoint: an exported prior, or one of LlamaGen, whose weights go on; empty: random."""

    checkpoint: str = ""


@dataclasses.dataclass(frozen=True)
class PriorRecipe:
    """Everything that decides a run.

    output: folder for checkpoints, metrics and the export; export: write it at the end, of the averaged weights where train.average
    keeps them and export_average is true.
    """

    prior: GPTConfig = GPTConfig()
    init: PriorInit = PriorInit()
    data: CodeDataConfig = CodeDataConfig()
    train: PriorTrainConfig = PriorTrainConfig()
    mesh: MeshConfig = MeshConfig()
    output: str = "runs/prior"
    export: bool = True
    export_average: bool = True

    def __post_init__(self):
        caption = self.prior.condition == "caption"
        if caption and not (self.data.captions or self.data.generated):
            raise ConfigError("prior.condition=caption needs data.captions, the folder with the features of captions")
        if not caption and self.data.captions:
            raise ConfigError(
                "data.captions has no meaning for prior.condition=class: leave it empty, or train a caption prior"
            )


def shrink(recipe: PriorRecipe) -> PriorRecipe:
    """Same structure, smoke sizes, six updates on made-up codes."""
    prior = dataclasses.replace(
        recipe.prior, layers=2, heads=2, kv_heads=2, width=32, mlp=64, codes=64, grid=4, classes=8, caption_slots=6,
        caption_width=16,
    )  # fmt: skip
    train = dataclasses.replace(recipe.train, steps=6, global_batch=8, log_every=1, save_every=3, dtype="float32")
    data = CodeDataConfig(generated=32, threads=2)
    return dataclasses.replace(recipe, prior=prior, train=train, data=data, output=f"{recipe.output}_smoke")
