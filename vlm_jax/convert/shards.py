"""safetensors in and out: directories of shards read by slices, and written tensor by tensor.

u64 header length | JSON {"__metadata__": {"format": "pt"}, name: {dtype, shape, data_offsets}} padded to 8 |
raw little-endian data
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_jax.convert.files import read_json, write_json
from vlm_jax.convert.raw import read_slice
from vlm_jax.convert.tensors import DTYPES, CheckpointError, Tensor
from vlm_jax.convert.torch_pickle import read_tensors

STORED = {
    "F64": np.dtype(np.float64), "F32": DTYPES["f32"], "F16": DTYPES["f16"], "BF16": DTYPES["bf16"],
    "BOOL": np.dtype(np.bool_),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
}  # fmt: skip
CODES = {dtype: code for code, dtype in STORED.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_file(path: Path) -> dict[str, Tensor]:
    """Lazy tensors of one safetensors file; a damaged file raises one sentence."""
    try:
        with safe_open(str(path), framework="numpy") as checked:  # sizes and offsets, which it does not tell
            names = list(checked.keys())
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}): copy or download it again"
        ) from error
    for name in names:
        code = header[name]["dtype"]
        if code not in STORED:
            raise CheckpointError(
                f"{path}: tensor {name} is stored as {code}, which is not supported: use float32, float16 or bfloat16"
            )
    return {name: _lazy(name, header[name], 8 + length, path) for name in names}


def _lazy(name: str, entry: Mapping[str, Any], data: int, path: Path) -> Tensor:
    """One tensor of a file whose data begin at byte `data`."""
    shape, dtype = tuple(entry["shape"]), STORED[entry["dtype"]]
    offset = data + entry["data_offsets"][0]
    return Tensor(name, shape, dtype, str(path), lambda index: read_slice(path, offset, shape, dtype, index))


def read_directory(directory: Path) -> dict[str, Tensor]:
    """Lazy tensors of a model directory: safetensors (one file or shards with an index), else
    pytorch_model*.bin.

    A shard that the index names but is not there, or a tensor that its shard lacks, raises one sentence.
    """
    for single, read in ((SINGLE, read_file), ("pytorch_model.bin", read_tensors)):
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _read_shards(index, read)
        if (directory / single).is_file():
            return read(directory / single)
    raise CheckpointError(
        f"{directory} holds no weights: it needs model.safetensors, model.safetensors.index.json with its "
        "shards, pytorch_model.bin "
        "or pytorch_model.bin.index.json with its shards"
    )


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor of `weight_map`, each from the shard that the index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index} has no weight_map: it is not the index of a sharded checkpoint")
    shards = sorted(set(places.values()))
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent} lacks the shard {absent[0]} ({len(absent)} of {len(shards)} missing): copy it again"
        )
    opened = {shard: read(index.parent / shard) for shard in shards}
    lost = [name for name, shard in places.items() if name not in opened[shard]]
    if lost:
        raise CheckpointError(
            f"{index.parent / places[lost[0]]} lacks the tensor {lost[0]} that {index.name} places there"
        )
    return {name: opened[shard][name] for name, shard in places.items()}


class Planned(NamedTuple):
    """A tensor to be written: name, shape and type are known before its values are."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Iterable[Planned], progress: Callable[[int], None] = lambda _: None) -> None:
    """One safetensors file: the header, then the tensors one by one; `progress(bytes)` after each."""
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }  # fmt: skip
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            values = np.asarray(tensor.read(), order="C")
            if values.shape != tensor.shape or values.dtype != tensor.dtype:
                raise CheckpointError(
                    f"tensor {tensor.name} was announced as {tensor.dtype} {tensor.shape} but is "
                    f"{values.dtype} {values.shape}"
                )
            # bytes, not the array: bfloat16 has no buffer format of its own
            file.write(memoryview(values.reshape(-1).view(np.uint8)))
            progress(tensor.size)
        # some file systems report a full disk only here
        file.flush()
        os.fsync(file.fileno())


def plan_shards(tensors: Iterable[Planned], max_shard: int) -> list[list[Planned]]:
    """Tensors in order, cut into shards of at most `max_shard` bytes (a larger tensor gets a shard of its
    own).
    """
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > max_shard:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def write_directory(
    directory: Path,
    tensors: Iterable[Planned],
    max_shard: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """`model.safetensors`, or `model-0000i-of-0000N.safetensors` with an index when more than one shard is
    needed; `progress(bytes written, bytes in all)` after each tensor.
    """
    tensors, done = list(tensors), 0
    total = sum(tensor.size for tensor in tensors)

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    shards = plan_shards(tensors, max_shard)
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0], count)
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, count)
        places.update({tensor.name: name for tensor in shard})
    totals = {
        "total_parameters": sum(math.prod(t.shape) for t in tensors),
        "total_size": total,
    }
    write_json(directory / INDEX, {"metadata": totals, "weight_map": places})
