"""The `init` part of a recipe, opened: which model it makes, which checkpoint its weights are read from, and the tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.convert.read import Checkpoint, open_checkpoint
from vlm_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from vlm_jax.recipe import Recipe

IMAGE_TOKENS = ("<im_start>", "<im_end>")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint as `train.state` reads it: by path and slice."""

    checkpoint: Checkpoint

    def __contains__(self, path: str) -> bool:
        return path in self.checkpoint.leaves and path not in self.checkpoint.missing

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` of parameter `path`."""
        return self.checkpoint.read(path, index)


def open_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of data.tokenizer, else of the weights; with <im_start> and <im_end> if the data uses them."""
    place = recipe.data.tokenizer or recipe.init.checkpoint or recipe.init.llm
    if not place:
        raise ConfigError(
            "there is no tokenizer: set data.tokenizer to a folder with tokenizer.json or tokenizer.model"
        )
    tokenizer = load_tokenizer(place)
    return tokenizer.with_tokens(*IMAGE_TOKENS) if recipe.data.im_start_end else tokenizer


def open_weights(recipe: Recipe, tokenizer: Tokenizer) -> tuple[VLMConfig, Source | None]:
    """(the model, its weights or None for all random).

    Shapes come from the checkpoint's own config.json; which features are read, the projector and the handling of image sizes come from
    the recipe where the checkpoint is a bare language model.
    """
    init, wanted = recipe.init, recipe.model
    main = init.checkpoint or init.llm
    if not main:
        if not init.random:
            raise ConfigError(
                "init.llm and init.checkpoint are empty: give a folder with weights, or set init.random=True"
            )
        for key in ("vision", "projector"):
            if getattr(init, key):
                raise ConfigError(f"init.{key} needs a language model to go with: set init.llm or init.checkpoint too")
        check_vocabulary(tokenizer, wanted.llm.vocab, "the config")
        return wanted, None
    if not init.checkpoint and not init.vision and not init.random:
        raise ConfigError(
            "init.vision is empty: give a CLIP or SigLIP folder, or set init.random=True to start the tower at random"
        )
    parts = {
        "vision": init.vision or None,
        "llm": (init.llm or None) if init.checkpoint else None,
        "projector": init.projector or None,
    }
    found = open_checkpoint(main, **parts, partial=True)
    config = _combined(found.config, recipe)
    rows = max(config.llm.vocab, tokenizer.size)
    check_vocabulary(tokenizer, rows, main)
    checkpoint = open_checkpoint(main, **parts, partial=True, config=config, vocab=rows)
    refused = [
        path for path in checkpoint.missing if not path.startswith(("projector/", "tower/unused/")) and not init.random
    ]
    if refused and not (refused == ["image_newline"]):
        raise ConfigError(
            f"{main} has no {refused[0]}: give the part that is missing under init, or set init.random=True"
        )
    return checkpoint.config, Source(checkpoint)


def _combined(found: VLMConfig, recipe: Recipe) -> VLMConfig:
    """The checkpoint's shapes with the recipe's choices."""
    wanted, init = recipe.model, recipe.init
    if init.checkpoint:
        return dataclasses.replace(found, aspect=wanted.aspect if wanted.aspect != "anyres" else found.aspect)
    vision = found.vision if init.vision else wanted.vision
    select = "full" if vision.kind == "siglip" else wanted.vision.select
    vision = dataclasses.replace(vision, feature_layers=wanted.vision.feature_layers, select=select)
    projector = found.projector if init.projector else wanted.projector
    return dataclasses.replace(wanted, vision=vision, projector=projector, llm=found.llm)


def tokenizer_folder(recipe: Recipe) -> Path:
    """The folder whose tokenizer files an export copies."""
    return Path(recipe.data.tokenizer or recipe.init.checkpoint or recipe.init.llm)
