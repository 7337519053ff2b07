"""Priors over codes in files: LlamaGen's checkpoints in, a directory of ours out, whose tensors the original program knows by name.

    DIR/model.safetensors    float32 tensors under LlamaGen's names and in its layout (visual_tokenizers.priors.gpt_names)
    DIR/config.json          {"format": "vlm_jax prior 1", "gpt": {...}}

    c2i_B_256.pt             the first of "model", "module", "state_dict", "ema", or the tensors themselves
Torch files are read without torch, and no code in them is run. They do not tell how many codes a side has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import ConfigError, from_dict, to_dict
from vlm_jax.convert.files import read_json, staging, write_json
from vlm_jax.convert.shards import SINGLE, Planned, read_file, write_file
from vlm_jax.convert.tensors import CheckpointError, Tensor, full
from vlm_jax.convert.torch_pickle import load
from vlm_jax.visual_tokenizers.priors import gpt_names
from vlm_jax.visual_tokenizers.priors.options import GPTConfig

FORMAT = "vlm_jax prior 1"
TORCH = (".pt", ".pth", ".ckpt", ".bin")
GRIDS = (16, 24, 32)  # published ones


class Prior(NamedTuple):
    """What a prior is made of: parameters {path: float32 array}."""

    config: GPTConfig
    params: dict[str, np.ndarray]


class _Read(dict):
    """{name: lazy tensor}, an array when it is asked for."""

    def __getitem__(self, key: str) -> np.ndarray:
        tensor = super().__getitem__(key)
        return tensor.read(full(tensor.shape))


def load_prior(path: str | os.PathLike, grid: int = 0, heads: int = 0) -> Prior:
    """Read a directory of ours (or of a training run), or a weight file of LlamaGen.

    grid: codes per side, needed with a weight file. heads: needed where its size is none of the published ones. CheckpointError in
    one sentence: no prior, a tensor that is absent or has another shape, a file that would run code.
    """
    path = Path(path)
    if (path / "export" / "config.json").is_file():
        path = path / "export"  # of a training run, whose own config.json is a recipe
    try:
        if path.is_dir():
            return _read_ours(path)
        tensors = _tensors(path)
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


def save_prior(folder: str | os.PathLike, config: GPTConfig, params: Mapping[str, Any]) -> None:
    """Write the directory of the module docstring, all or nothing; arrays may be numpy's or jax's."""
    written = gpt_names.write(config, params)
    planned = [Planned(key, value.shape, value.dtype, lambda value=value: value) for key, value in written.items()]
    with staging(folder) as stage:
        write_file(stage / SINGLE, planned)
        write_json(stage / "config.json", {"format": FORMAT, "gpt": to_dict(config)})


def _read_ours(folder: Path) -> Prior:
    file = folder / "config.json"
    raw = read_json(file) if file.is_file() else {}
    if raw.get("format") != FORMAT or not isinstance(raw.get("gpt"), Mapping):
        raise CheckpointError(f"{folder} is no prior: its config.json does not say {FORMAT!r} with a part gpt")
    config = from_dict(GPTConfig, raw["gpt"], "gpt.")
    return Prior(config, gpt_names.read(config, _Read(read_file(folder / SINGLE))))


def _tensors(file: Path) -> dict[str, Tensor]:
    """{name: lazy tensor} of a weight file."""
    if file.suffix not in (*TORCH, ".safetensors"):
        raise CheckpointError(
            f"{file} is neither a prior's directory nor a weight file ({', '.join(TORCH)}, .safetensors)"
        )
    found = read_file(file) if file.suffix == ".safetensors" else load(file, objects=True)
    found = gpt_names.unwrapped(found) if isinstance(found, Mapping) else {}
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
