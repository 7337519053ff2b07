"""The `init` part of a recipe, opened: which model it makes, which checkpoint its weights are read from, and the tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from vlm_jax.config import ConfigError, LLMConfig, T5Config, VLMConfig
from vlm_jax.convert.manifest import read_manifest
from vlm_jax.convert.merge import open_model
from vlm_jax.convert.read import Checkpoint, open_checkpoint
from vlm_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from vlm_jax.models import vlm
from vlm_jax.models.adapters import LEAVES, LORA_SCALE
from vlm_jax.recipe import Recipe
from vlm_jax.train.state import chosen

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
    """(the model, its weights or None for all random); what cannot be adapted, quantised or trained is refused here."""
    model, source = _open(recipe, tokenizer)
    chosen(model, recipe.train)
    return model, source


def _open(recipe: Recipe, tokenizer: Tokenizer) -> tuple[VLMConfig, Source | None]:
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
    if init.checkpoint and read_manifest(init.checkpoint).kind == "adapter":
        return _adapted(recipe, tokenizer)
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


def _adapted(recipe: Recipe, tokenizer: Tokenizer) -> tuple[VLMConfig, Source]:
    """The adapter directory init.checkpoint on its base, to be trained on.

    Where model.lora is empty its adapters are the model's; else those of model.lora that it has go on and the others start anew.
    """
    init, parts = recipe.init, ("vision", "llm", "projector")
    checkpoint = open_model(init.checkpoint, **{key: getattr(init, key) or None for key in parts})
    config = _combined(checkpoint.config, recipe)
    config = config if config.lora else dataclasses.replace(config, lora=checkpoint.config.lora)
    check_vocabulary(tokenizer, config.llm.vocab, init.checkpoint)
    shapes = vlm.shapes(config)
    for path, leaf in checkpoint.leaves.items():
        linear, _, name = path.rpartition("/")
        if name in LEAVES and (path not in shapes or shapes[path].shape != tuple(leaf.shape)):
            rank = checkpoint.leaves[f"{linear}/{LORA_SCALE}"].shape[-1]
            raise ConfigError(
                f"{init.checkpoint} has an adapter of rank {rank} on {linear}, which is not what model.lora gives it: "
                "set its rank there, or leave model.lora empty to take the adapter as it is"
            )
    return config, Source(checkpoint)


def _combined(found: VLMConfig, recipe: Recipe) -> VLMConfig:
    """The checkpoint's shapes with the recipe's choices."""
    wanted, init = recipe.model, recipe.init
    if init.checkpoint:
        aspect = wanted.aspect if wanted.aspect != "anyres" else found.aspect
        return dataclasses.replace(
            found, llm=_dropping(found, wanted), aspect=aspect, lora=wanted.lora, quant=wanted.quant
        )
    vision = found.vision if init.vision else wanted.vision
    select = "full" if vision.kind == "siglip" else wanted.vision.select
    vision = dataclasses.replace(vision, feature_layers=wanted.vision.feature_layers, select=select)
    projector = found.projector if init.projector else wanted.projector
    return dataclasses.replace(wanted, vision=vision, projector=projector, llm=_dropping(found, wanted))


def _dropping(found: VLMConfig, wanted: VLMConfig) -> LLMConfig | T5Config:
    """The checkpoint's language model with the recipe's dropout, which is no property of its weights."""
    if not (found.encoder_decoder and wanted.encoder_decoder):
        return found.llm
    return dataclasses.replace(found.llm, dropout=wanted.llm.dropout)


def tokenizer_folder(recipe: Recipe) -> Path:
    """The folder whose tokenizer files an export copies."""
    return Path(recipe.data.tokenizer or recipe.init.checkpoint or recipe.init.llm)
