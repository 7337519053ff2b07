"""Priors over codes in files: LlamaGen's checkpoints in, a directory of ours out, whose tensors the original program knows by name.

    DIR/model.safetensors    float32 tensors under the original's names and in its layout (priors.gpt_names, priors.hierarchy_names)
    DIR/config.json          {"format": "vlm_jax prior 1", "gpt", "rq" or "hq": {...}}

    c2i_B_256.pt             LlamaGen: the first of "model", "module", "state_dict", "ema", or the tensors themselves
    FOLDER/model.pt          RQ- and HQ-Transformers, with their config.yaml: see hierarchical_prior
Torch files are read without torch, and no code in them is run. LlamaGen's do not tell how many codes a side has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import ConfigError, from_dict, to_dict
from vlm_jax.convert import hierarchical_prior
from vlm_jax.convert.files import read_json, staging, write_json
from vlm_jax.convert.shards import SINGLE, Planned, read_file, write_file
from vlm_jax.convert.tensors import CheckpointError, Tensor, full
from vlm_jax.convert.torch_pickle import load
from vlm_jax.visual_tokenizers.priors import gpt_names, hierarchy_names
from vlm_jax.visual_tokenizers.priors.hierarchy_options import HQTransformerConfig, RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.models import Config
from vlm_jax.visual_tokenizers.priors.options import GPTConfig

FORMAT = "vlm_jax prior 1"
TORCH = (".pt", ".pth", ".ckpt", ".bin")
GRIDS = (16, 24, 32)  # published ones
KINDS = {"gpt": GPTConfig, "rq": RQTransformerConfig, "hq": HQTransformerConfig}


class Prior(NamedTuple):
    """What a prior is made of: parameters {path: float32 array}."""

    config: Config
    params: dict[str, np.ndarray]


class _Read(dict):
    """{name: lazy tensor}, an array when it is asked for."""

    def __getitem__(self, key: str) -> np.ndarray:
        tensor = super().__getitem__(key)
        return tensor.read(full(tensor.shape))


def load_prior(path: str | os.PathLike, grid: int = 0, heads: int = 0) -> Prior:
    """Read a directory of ours (or of a training run), or what an original program left: a weight file, or the folder of one.

    grid: codes per side, needed with a weight file of LlamaGen. heads: needed where its size is none of the published ones.
    CheckpointError in one sentence: no prior, a tensor that is absent or has another shape, a file that would run code.
    """
    path = Path(path)
    if (path / "export" / "config.json").is_file():
        path = path / "export"  # of a training run, whose own config.json is a recipe
    try:
        if path.is_dir() and not hierarchical_prior.weight_file(path):
            return _read_ours(path)
        file = hierarchical_prior.weight_file(path) or path
        tensors = _tensors(file)
        if hierarchical_prior.is_one(tensors):
            return Prior(*hierarchical_prior.load_prior(file))
        if not grid:
            known = ", ".join(map(str, GRIDS))
            raise ConfigError(
                f"the file does not tell how many codes a side of its images has: give --grid, e.g. one of {known}"
            )
        config = gpt_names.config_of({key: tensor.shape for key, tensor in tensors.items()}, grid, heads or None)
        return Prior(config, gpt_names.read(config, _Read(tensors)))
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def is_prior(path: str | os.PathLike) -> bool:
    """Whether a path is one of a prior and of nothing else: a directory of ours, a run that trained one, or a weight file."""
    path = Path(path)
    if path.is_dir():
        exported = (path / part / "config.json" for part in ("", "export"))
        if any(file.is_file() and read_json(file).get("format") == FORMAT for file in exported):
            return True
        path = hierarchical_prior.weight_file(path) or path
    if not path.is_file() or path.suffix not in (*TORCH, ".safetensors"):
        return False
    try:
        tensors = _tensors(path)
    except CheckpointError:
        return False  # whoever reads it next says why
    alone = not any(key.startswith("stage1.") for key in tensors)  # HQ's programs keep the tokenizer beside it
    return gpt_names.ANCHOR in tensors or alone and hierarchical_prior.is_one(tensors)


def convert_prior(source: str, target: str, grid: int = 0, heads: int = 0, **other: Any) -> int:
    """`convert` of a prior: any form that `load_prior` reads becomes a directory of ours; returns the exit code."""
    useless = next((name for name in other if name != "max_shard"), None)
    if useless:
        raise CheckpointError(f"{source} is a prior over codes: --{useless} has no meaning for it")
    if Path(target).suffix in (*TORCH, ".safetensors"):
        raise CheckpointError(f"--to={target}: a prior is written as a directory, give one")
    found = load_prior(source, grid, heads)
    save_prior(target, *found)
    size, name = sum(math.prod(x.shape) for x in found.params.values()), _kind(found.config)
    shapes = " and ".join(" x ".join(map(str, shape)) for _, shape in found.config.levels_of_codes)
    print(f"{target}: {name} prior of {source}, {size / 1e6:.1f} M parameters, draws {shapes} codes")
    return 0


def save_prior(folder: str | os.PathLike, config: Config, params: Mapping[str, Any]) -> None:
    """Write the directory of the module docstring, all or nothing; arrays may be numpy's or jax's."""
    written = (gpt_names if isinstance(config, GPTConfig) else hierarchy_names).write(config, params)
    planned = [Planned(key, value.shape, value.dtype, lambda value=value: value) for key, value in written.items()]
    with staging(folder) as stage:
        write_file(stage / SINGLE, planned)
        write_json(stage / "config.json", {"format": FORMAT, _kind(config): to_dict(config)})


def _kind(config: Config) -> str:
    return next(name for name, kind in KINDS.items() if isinstance(config, kind))


def _read_ours(folder: Path) -> Prior:
    file = folder / "config.json"
    raw = read_json(file) if file.is_file() else {}
    name = next((name for name in KINDS if isinstance(raw.get(name), Mapping)), None)
    if raw.get("format") != FORMAT or name is None:
        raise CheckpointError(
            f"{folder} is no prior: its config.json does not say {FORMAT!r} with a part gpt, rq or hq"
        )
    config = from_dict(KINDS[name], raw[name], f"{name}.")
    read = (gpt_names if name == "gpt" else hierarchy_names).read
    return Prior(config, read(config, _Read(read_file(folder / SINGLE))))


def _tensors(file: Path) -> dict[str, Tensor]:
    """{name: lazy tensor} of a weight file."""
    if file.suffix not in (*TORCH, ".safetensors"):
        raise CheckpointError(
            f"{file} is neither a prior's directory nor a weight file ({', '.join(TORCH)}, .safetensors)"
        )
    found = read_file(file) if file.suffix == ".safetensors" else load(file, objects=True)
    found = gpt_names.unwrapped(found) if isinstance(found, Mapping) else {}
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
