"""A whole run that trains a prior over codes, as one frozen value: prior, codes, training, mesh, output."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ConfigError
from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.visual_tokenizers.priors.hierarchy_options import HQTransformerConfig, RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.options import GPTConfig


@dataclasses.dataclass(frozen=True)
class PriorInit:
    """What a run starts from. checkpoint: an exported prior, or one of its original program, whose weights go on; empty: random.

    tokenizer: the one that made the codes, whose codebook an RQ-Transformer reads, or that encodes the images of data.path. random:
    random numbers stand in for one that is not given, for smoke runs.
    """

    checkpoint: str = ""
    tokenizer: str = ""
    random: bool = False


@dataclasses.dataclass(frozen=True)
class PriorRecipe:
    """Everything that decides a run.

    output: folder for checkpoints, metrics and the export; export: write it at the end, of the averaged weights where train.average
    keeps them and export_average is true.
    """

    prior: GPTConfig | RQTransformerConfig | HQTransformerConfig = GPTConfig()
    init: PriorInit = PriorInit()
    data: CodeDataConfig = CodeDataConfig()
    train: PriorTrainConfig = PriorTrainConfig()
    mesh: MeshConfig = MeshConfig()
    output: str = "runs/prior"
    export: bool = True
    export_average: bool = True

    def __post_init__(self):
        condition = self.prior.condition
        what = {"caption": "features of captions", "text": "tokens of texts"}.get(condition)
        if what and not (self.data.captions or self.data.generated):
            raise ConfigError(f"prior.condition={condition} needs data.captions, the folder with the {what}")
        if not what and self.data.captions:
            raise ConfigError(
                f"data.captions has no meaning for prior.condition={condition}: leave it empty, or train a caption prior"
            )
        self._check_codes()
        reads = isinstance(self.prior, RQTransformerConfig) and self.prior.reads_codebook
        if reads and not (self.init.tokenizer or self.init.random):
            raise ConfigError(
                "init.tokenizer is empty: this RQ-Transformer reads the codebook of the tokenizer that made the codes, so name it"
            )

    def _check_codes(self) -> None:
        """Raise ConfigError for images without a tokenizer, and for soft labels without images."""
        if self.data.path and not (self.init.tokenizer or self.init.random):
            raise ConfigError(
                "init.tokenizer is empty: name the tokenizer that turns the images of data.path into codes"
            )
        if self.train.soft_temperature and not self.data.path:
            raise ConfigError(
                f"train.soft_temperature={self.train.soft_temperature} asks for soft labels, which need images, and data.codes has hard "
                "codes alone: give data.path in its place, or set train.soft_temperature=0.0 and train.stochastic_codes=False"
            )


def shrink(recipe: PriorRecipe) -> PriorRecipe:
    """Same structure, smoke sizes, six updates on made-up codes, or on made-up images with a random tokenizer."""
    prior = shrunk(recipe.prior)
    train = dataclasses.replace(recipe.train, steps=6, global_batch=8, log_every=1, save_every=3, dtype="float32")
    d = recipe.data
    data = CodeDataConfig(path=d.path, crop=d.crop, flip=d.flip, generated=32, threads=2)
    made = {"init": PriorInit(random=True), "output": f"{recipe.output}_smoke"}
    return dataclasses.replace(recipe, prior=prior, train=train, data=data, **made)


def shrunk(
    prior: GPTConfig | RQTransformerConfig | HQTransformerConfig,
) -> GPTConfig | RQTransformerConfig | HQTransformerConfig:
    """A prior of the same kind and parts, but tiny."""
    if isinstance(prior, GPTConfig):
        sizes = {"layers": 2, "heads": 2, "kv_heads": 2, "width": 32, "mlp": 64, "codes": 64, "grid": 4, "classes": 8}
        return dataclasses.replace(prior, **sizes, caption_slots=6, caption_width=16)
    stacks = {
        name: dataclasses.replace(stack, layers=2, width=32, heads=2)
        for name, stack in (("body", prior.body), ("head", prior.head))
    }
    if isinstance(prior, RQTransformerConfig):
        sizes = {"conditions": min(8, prior.conditions), "condition_tokens": min(6, prior.condition_tokens)}
        return dataclasses.replace(prior, grid=(4, 4), codes=64, code_width=16, **sizes, **stacks)
    sizes = {"positions": 16, "classes": 8, "text_codes": 8, "text_tokens": 6}
    return dataclasses.replace(prior, grid=2, codes=(64,) * prior.levels, **sizes, **stacks)
