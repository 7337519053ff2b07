"""A whole run as one frozen value: model, where its weights come from, data, training, mesh, output.

A config file returns `config_dict(Recipe(...))`, the command line overrides keys of that ConfigDict, and `from_config` turns it back
into a Recipe, checked once. `save` puts it beside every checkpoint as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections import config_dict as placeholders

from vlm_jax.config import ConfigError, VLMConfig, from_dict, to_dict
from vlm_jax.data.options import DataConfig
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.prior_recipe import PriorRecipe
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train.options import TrainConfig


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where weights come from: a whole model directory, or its parts. A directory's own config.json replaces that part of `model`.

    checkpoint: LLaVA directory (HF or original). vision: CLIP or SigLIP directory. llm: Llama-family or T5 directory. projector:
    mm_projector.bin or safetensors; empty: random. random: parts without a directory start from random numbers, even tower and LLM.
    """

    checkpoint: str = ""
    vision: str = ""
    llm: str = ""
    projector: str = ""
    random: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. output: folder for checkpoints, metrics and the export; export: write it at the end; merge: with
    trained adapters put into their base, as a model instead of an adapter.
    """

    model: VLMConfig = VLMConfig()
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    output: str = "runs/train"
    export: bool = True
    merge: bool = False


AnyRecipe = Recipe | TokenizerRecipe | PriorRecipe


def config_dict(recipe: AnyRecipe) -> ConfigDict:
    """Recipe -> locked ConfigDict; a field that may be None becomes a placeholder that knows its type."""
    return _config_dict(recipe).lock()


def from_config(config: Any) -> AnyRecipe:
    """ConfigDict or parsed JSON -> the recipe it is of; ConfigError names an unknown or ill-typed key."""
    other = PriorRecipe if "prior" in config else TokenizerRecipe if "tokenizer" in config else Recipe
    kind = Recipe if "model" in config else other
    return from_dict(kind, config.to_dict() if isinstance(config, ConfigDict) else config)


def of_vlm(config: Any) -> Recipe:
    """`from_config` for commands that know nothing but vision-language models; ConfigError for other recipes."""
    recipe = from_config(config)
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            "this config trains no vision-language model, and this command is for those: name one that does"
        )
    return recipe


def save(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_dict(recipe), indent=2) + "\n")


def load(path: Path) -> AnyRecipe:
    """Read what `save` wrote."""
    try:
        return from_config(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: the config of a run lies beside its checkpoints") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): restore it or start in another output folder") from None


def _config_dict(value: Any) -> ConfigDict:
    hints = typing.get_type_hints(type(value))
    out = ConfigDict()
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            item = _config_dict(item)
        elif isinstance(item, Mapping):
            item = ConfigDict({k: _config_dict(v) if dataclasses.is_dataclass(v) else v for k, v in item.items()})
        elif isinstance(item, tuple) and any(map(dataclasses.is_dataclass, item)):
            item = tuple(_config_dict(part) for part in item)
        elif item is None:
            item = placeholders.placeholder(_type_behind(hints[field.name]))
        out[field.name] = item
    return out


def _type_behind(hint: Any) -> type:
    """`int | None` -> int, `tuple[int, int] | None` -> tuple."""
    inner = hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
    return typing.get_origin(inner) or inner
