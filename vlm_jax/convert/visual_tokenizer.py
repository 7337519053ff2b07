"""Visual tokenizers in files: original checkpoints in, a directory of ours out, whose tensors the original programs know by name.

    DIR/model.safetensors    float32 tensors under the original program's names and in its layout (visual_tokenizers.names)
    DIR/config.json          {"format", "autoencoder": {...}, "quantizer": {...}, "names": "llamagen" | "taming", "extra": {...}}

    vq_ds16_c2i.pt           LlamaGen: the first of "ema", "model", "state_dict", or the tensors themselves
    FOLDER/config.yaml with *.pt, ckpt/state_dict.ckpt or ckpt/last.ckpt        RQ-VAE, HQ-VAE, UniCode

Torch files are read without torch, and no code in them is run. Names may begin with generator., stage1., module. or any one prefix.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from vlm_jax.config import ConfigError, from_dict, to_dict
from vlm_jax.convert.files import read_json, staging, write_json
from vlm_jax.convert.pickled_objects import Remembered
from vlm_jax.convert.shards import SINGLE, Planned, read_file, write_file
from vlm_jax.convert.tensors import CheckpointError, Tensor, full
from vlm_jax.convert.torch_pickle import load
from vlm_jax.convert.visual_tokenizer_config import config_of, known_settings
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.codebook import TABLE
from vlm_jax.visual_tokenizers.options import PUBLISHED, TokenizerConfig

FORMAT = "vlm_jax visual tokenizer 1"
TORCH = (".pt", ".pth", ".ckpt", ".bin")
CONTAINERS = ("ema", "model", "state_dict")
ANCHOR = "encoder.conv_in.weight"  # the tensor whose name begins with the prefix of all others
PREFIXES = ("", "generator.", "stage1.", "module.", "stage1.generator.")  # the first that is there is taken

Arrays = dict[str, np.ndarray]


class Tokenizer(NamedTuple):
    """What a tokenizer is made of: parameters {path: array}, codebooks {book: {field: array}}, float32 but for token ids."""

    config: TokenizerConfig
    params: Arrays
    codebooks: dict[str, Arrays]


def is_tokenizer(path: str | os.PathLike) -> bool:
    """Whether a path is one of a visual tokenizer: a weight file, a directory of ours, or one of an original program."""
    path = Path(path)
    if path.is_file():
        return path.suffix in (*TORCH, ".safetensors")
    if (path / "config.json").is_file():
        return read_json(path / "config.json").get("format") == FORMAT
    return _settings_beside(path) is not None


def load_tokenizer(path: str | os.PathLike, config_name: str = "") -> Tokenizer:
    """Read a tokenizer. config_name: one of visual_tokenizers.options.PUBLISHED, where shapes and settings shall not decide.

    CheckpointError in one sentence: no tokenizer, a tensor that is absent or has another shape, a file that would run code.
    """
    path = Path(path)
    if path.is_dir() and (path / "export" / "config.json").is_file():
        path = path / "export"  # of a training run, whose own config.json is a recipe
    if path.is_dir() and (path / "config.json").is_file():
        return _read_ours(path)
    file = _weight_file(path) if path.is_dir() else path
    tensors, args = _tensors(file)
    tensors = _without_prefix(tensors, file)
    try:
        if config_name:
            config = published(config_name)
        else:
            shapes = {key: tensor.shape for key, tensor in tensors.items()}
            config = config_of(shapes, _repeated(tensors), _settings_beside(file.parent, file.parent.parent) or args)
        return Tokenizer(config, *names.read(config, _Read(tensors)))
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def save_tokenizer(
    folder: str | os.PathLike,
    config: TokenizerConfig,
    params: Mapping[str, Any],
    codebooks: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the directory of the module docstring; arrays may be numpy's or jax's. extra: JSON values for people, which nothing reads.

    All or nothing: what was in `folder` before stays if it cannot be written.
    """
    written = names.write(config, params, codebooks)
    planned = [Planned(key, value.shape, value.dtype, lambda value=value: value) for key, value in written.items()]
    name = next((name for name, known in PUBLISHED.items() if known == config), None)
    about = {"format": FORMAT, **to_dict(config), "extra": dict(extra or {}) | ({"published": name} if name else {})}
    with staging(folder) as stage:
        write_file(stage / SINGLE, planned)
        write_json(stage / "config.json", about)


def convert_tokenizer(source: str, target: str, config_name: str = "", **other: Any) -> int:
    """`convert` of a visual tokenizer: any form that `load_tokenizer` reads becomes a directory of ours; returns the exit code."""
    useless = next((name for name in other if name != "max_shard"), None)
    if useless:
        raise CheckpointError(f"{source} is a visual tokenizer: --{useless} has no meaning for it")
    if Path(target).suffix in (*TORCH, ".safetensors"):
        raise CheckpointError(f"--to={target}: a visual tokenizer is written as a directory, give one")
    found = load_tokenizer(source, config_name)
    save_tokenizer(target, *found, extra={"source": Path(source).name})
    size = sum(math.prod(x.shape) for x in found.params.values())
    q = found.config.quantizer
    tables = " + ".join(str(book[TABLE].shape[-2]) for book in found.codebooks.values())
    print(f"{target}: {q.kind} tokenizer of {source}, {size / 1e6:.1f} M parameters, codebooks of {tables} entries")
    return 0


def published(name: str) -> TokenizerConfig:
    """A published config by its name, also as LlamaGen writes it: VQ-16."""
    found = PUBLISHED.get(name) or PUBLISHED.get(name.lower().replace("-", ""))
    if found is None:
        raise ConfigError(f"--config_name={name} is unknown: use one of {', '.join(PUBLISHED)}")
    return found


def _read_ours(folder: Path) -> Tokenizer:
    raw = read_json(folder / "config.json")
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{folder / 'config.json'} is not the config of a visual tokenizer ({FORMAT})")
    known = {key: raw[key] for key in ("autoencoder", "quantizer", "names") if key in raw}
    try:
        config = from_dict(TokenizerConfig, known)
        return Tokenizer(config, *names.read(config, _Read(read_file(folder / SINGLE))))
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _weight_file(folder: Path) -> Path:
    """The one weight file of an original program's folder."""
    for name in ("ckpt/state_dict.ckpt", "ckpt/last.ckpt"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in (*TORCH, ".safetensors"))
    if len(found) != 1:
        what = f"{len(found)} weight files ({found[0].name}, {found[1].name} ...)" if found else "no weight file"
        raise CheckpointError(f"{folder} holds {what}: name the checkpoint of a visual tokenizer itself")
    return found[0]


def _settings_beside(*folders: Path) -> dict[str, Any] | None:
    """The config.yaml of RQ-VAE, HQ-VAE or UniCode in the first of these folders that has one."""
    for file in (folder / "config.yaml" for folder in folders):
        if file.is_file():
            try:
                raw = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, ValueError, OSError) as error:
                line = " ".join(str(error).split())
                raise CheckpointError(f"{file} is not readable YAML ({line})") from error
            if isinstance(raw, Mapping) and known_settings(raw):
                return dict(raw)
    return None


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({name: lazy tensor}, LlamaGen's training arguments or {}) of a weight file."""
    if file.suffix == ".safetensors":
        return read_file(file), {}
    found = load(file, objects=True)
    args = found.get("args") if isinstance(found, Mapping) else None
    for container in CONTAINERS:
        if isinstance(found, Mapping) and isinstance(found.get(container), Mapping) and found[container]:
            found = found[container]
            break
    tensors = (
        {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(
            f"{file} is not a tokenizer checkpoint: it holds no tensors, neither itself nor under {', '.join(CONTAINERS)}"
        )
    return tensors, args.state if isinstance(args, Remembered) else {}


def _without_prefix(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors under the names that the tokenizer's program gives them."""
    there = [key.removesuffix(ANCHOR) for key in tensors if key.endswith(ANCHOR)]
    chosen = next((p for p in PREFIXES if p in there), None)
    if chosen is None and len(there) == 1:
        chosen = there[0]
    if chosen is None:
        what = f"several ({', '.join(sorted(there))})" if there else "none"
        raise CheckpointError(
            f"{file} is not a tokenizer checkpoint: one tensor {ANCHOR} is needed, it has {what} among its {len(tensors)}"
        )
    return {key.removeprefix(chosen): value for key, value in tensors.items() if key.startswith(chosen)}


def _repeated(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Prefixes of tables that are the first one again, or were never used: their programs share the first."""
    firsts = {"quantize_b.embedding": "quantize_t.embedding"} | {
        key: "quantizer.codebooks.0.weight"
        for key in tensors
        if re.fullmatch(r"quantizer\.codebooks\.[1-9]\d*\.weight", key)
    }
    found = set()
    for key, first in firsts.items():
        if key not in tensors or first not in tensors:
            continue
        book = key.rpartition(".")[0]
        count = tensors.get(f"{book}.cluster_size")
        if (count is not None and not _array(count).any()) or np.array_equal(
            _array(tensors[key]), _array(tensors[first])
        ):
            found.add(book)
    return frozenset(found)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.read(full(tensor.shape))


class _Read(Mapping):
    """Lazy tensors as arrays, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __getitem__(self, key: str) -> np.ndarray:
        return _array(self._tensors[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
