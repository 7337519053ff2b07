"""Delta weights: a model as the difference from its base, for bases that may not be passed on (LLaVA-13b-delta).

    make    delta = target - base        apply    target = delta + base

Tensors of the base with fewer rows (the vocabulary grew) take part where both are; what the base lacks, projector or tower, is
stored as it is. Sums are taken in float32, one tensor in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.convert import names
from vlm_jax.convert.files import is_weights, read_json, staging, write_json
from vlm_jax.convert.manifest import FILE, read_manifest, write_manifest
from vlm_jax.convert.shards import Planned, read_directory, write_directory
from vlm_jax.convert.tensors import DTYPES, TORCH_NAMES, CheckpointError, Tensor, full

SIGNS = {"make": -1, "apply": 1}
GROWING = (("llm", "embed_tokens.weight"), ("head", "weight"))
OWN_ROOMS = ("projector", "newline", "tower")  # what a base may lack


def convert_delta(
    action: str,
    source: str | os.PathLike,
    base: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_shard: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """action `make`: write the delta of model `source` from `base`; `apply`: the model of delta `source`. Returns its parameters.

    Both are directories of any LLaVA or Llama format, the names in `target` are those of `source`. dtype: f32, f16 or bf16
    (default: float16 for a delta, as published ones are, else the type it is stored in). Errors are CheckpointError.
    """
    source, base = Path(source), Path(base)
    for place, wanted in ((source, "delta" if action == "apply" else "model"), (base, "model")):
        manifest = read_manifest(place)
        if manifest.kind != wanted and (manifest.written or manifest.kind == "adapter"):
            raise CheckpointError(f"{place} holds {manifest.kind} weights where --delta {action} needs a {wanted}")
    planned = list(
        combined(
            read_directory(source),
            read_directory(base),
            SIGNS[action],
            str(base),
            dtype or ("f16" if action == "make" else None),
        )
    )
    raw = read_json(source / "config.json")
    stored = max(planned, key=lambda tensor: tensor.size).dtype
    raw["dtype" if "dtype" in raw else "torch_dtype"] = TORCH_NAMES.get(stored, "float32")
    with staging(target) as stage:
        write_directory(stage, planned, max_shard, progress)
        for file in sorted(source.iterdir()):
            if file.is_file() and not is_weights(file.name) and file.name not in (FILE, "config.json"):
                shutil.copyfile(file, stage / file.name)
        write_json(stage / "config.json", raw)
        write_manifest(
            stage, "delta" if action == "make" else "model", base if action == "make" else None, Path(target)
        )
    return sum(int(np.prod(tensor.shape)) for tensor in planned)


def combined(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], sign: int, where: str, dtype: str | None = None
) -> Iterator[Planned]:
    """tensors + sign * base, for tensors of a model or delta by name; `where` names the base in errors."""
    known = {names.room_and_key(name): tensor for name, tensor in base.items() if not names.IGNORED.fullmatch(name)}
    left = {at: tensor.name for at, tensor in known.items() if at and at[0] in ("llm", "head")}
    for name, tensor in tensors.items():
        if names.IGNORED.fullmatch(name):
            continue
        at = names.room_and_key(name)
        if at is None:
            raise CheckpointError(f"{tensor.file} has {name}, which belongs to no part of a LLaVA model")
        other = known.get(at)
        left.pop(at, None)
        if other is None and at[0] not in OWN_ROOMS:
            raise CheckpointError(f"{where} is another base: it lacks {name}, of which {tensor.file} has a difference")
        rows = other is not None and other.shape != tensor.shape
        if rows and (at not in GROWING or other.shape[1:] != tensor.shape[1:]):
            raise CheckpointError(
                f"{where} is another base: its {other.name} has shape {list(other.shape)}, "
                f"{name} in {tensor.file} has {list(tensor.shape)}"
            )
        kind = DTYPES[dtype] if dtype else tensor.dtype
        yield Planned(name, tensor.shape, kind, _sum(tensor, other, sign, kind))
    if left:
        raise CheckpointError(f"{where} is another base: its {next(iter(left.values()))} has no counterpart")


def _sum(tensor: Tensor, other: Tensor | None, sign: int, dtype: np.dtype) -> Callable[[], Any]:
    """A function that reads tensor + sign * other, on the rows that both have."""

    def read() -> np.ndarray:
        values = tensor.read(full(tensor.shape)).astype(np.float32)
        if other is not None:
            rows = slice(0, min(tensor.shape[0], other.shape[0]))
            index = (rows, *full(tensor.shape[1:]))
            values[rows] += sign * other.read(index).astype(np.float32)
        return values.astype(dtype)

    return read
