"""Reading LoRA adapters: directories of PEFT (0.4 and later), of LLaVA's own program, and of SQ-LLaVA.

    adapter_config.json, adapter_model.safetensors or .bin     every layout
    non_lora_trainables.bin, config.json                       LLaVA: tensors trained whole, and what model it is
    Vit-lora/ with the first two                               SQ-LLaVA: the tower's adapter (alone after stage 1)

    base_model.model.<linear>.lora_A.weight [r, in]    stacked over layers:  <path>/lora_a      [L, in, R]
    base_model.model.<linear>.lora_B.weight [out, r]                         <path>/lora_b      [L, R, out]
    r, lora_alpha, the patterns                                              <path>/lora_scale  [L, R] float32

R is the largest rank among the layers of a stack; what a layer lacks is zero in both factors, so that it stays zero
in training and is left out again in writing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import LoRAConfig, VLMConfig
from vlm_jax.convert import names
from vlm_jax.convert.files import read_json
from vlm_jax.convert.manifest import PEFT_CONFIG, VIT_FOLDER
from vlm_jax.convert.names import Entry
from vlm_jax.convert.shards import read_file
from vlm_jax.convert.tensors import TRANSPOSE, ArrayLeaf, CheckpointError, Index, Leaf, Tensor, resolve
from vlm_jax.convert.torch_pickle import read_tensors

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED = (
    "non_lora_trainables.bin",
    "mm_projector.bin",
)  # the second where only the tower has adapters (SQ-LLaVA, stage 1)
WRAPPED = "base_model.model."  # what PEFT puts before every name of the base

PAIR = re.compile(r"(?P<linear>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")
COPY = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)|\.base_layer(?=\.)")

# what adapter_config.json may ask for beyond y = x W + s x A B, and is said to have then
OTHER_KINDS = {
    "use_dora": "DoRA's magnitudes",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "block-diagonal factors",
    "lora_bias": "biases inside the adapter",
    "layer_replication": "layers that are used several times",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "adapters of bare parameters",
    "alora_invocation_tokens": "adapters that start at a token",
    "arrow_config": "routing between adapters",
    "kasa_config": "KaSA's singular values",
    "monteclora_config": "sampled factors",
}
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that alter the base's weights too


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of an adapter_config.json; `ranks` and `alphas` are those of single linears, by pattern."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def of(self, linear: str) -> tuple[int, float]:
        """(rank, alpha) of the linear that the base calls `linear`."""
        return _by_pattern(self.ranks, linear, self.rank), _by_pattern(self.alphas, linear, self.alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """What the product of the factors is multiplied with."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(values: Mapping[str, Any], linear: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name, from a dot on."""
    return next((v for pattern, v in values.items() if re.match(rf"(.*\.)?({pattern})$", linear)), default)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The factors of one linear: `a` [r, in] and `b` [out, r], as in the file."""

    a: Tensor
    b: Tensor
    rank: int
    alpha: float
    settings: Settings


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in files, as parameters of a model.

    groups: for `VLMConfig.lora`; leaves: lora_a, lora_b and lora_scale of every linear, read when they are asked for;
    extra: {path: {layer, or None without layers: (entry, tensor)}} of the tensors that were trained whole.
    """

    directory: Path
    groups: tuple[LoRAConfig, ...]
    leaves: dict[str, Leaf | ArrayLeaf]
    extra: dict[str, dict[int | None, tuple[Entry, Tensor]]]

    def arrays(self) -> dict[str, np.ndarray]:
        """The leaves read into memory."""
        return {path: leaf.read() for path, leaf in self.leaves.items()}

    def overlay(self, path: str, leaf: Leaf | None) -> Leaf | None:
        """`leaf` of the base with what this adapter trained whole in place; without one, the parameter if it is all here."""
        mine = self.extra[path]
        entry = next(iter(mine.values()))[0]
        if leaf is None:
            layers = range(len(mine)) if entry.layer is not None else (None,)
            if set(layers) != mine.keys():
                return None
            return Leaf(path, tuple(mine[i][1] for i in layers), entry.layout, entry.layer is not None)
        parts = list(leaf.parts)
        for layer, (_, tensor) in mine.items():  # the base's name stays: a merged model is written under it
            parts[layer or 0] = dataclasses.replace(tensor, name=parts[layer or 0].name)
        return dataclasses.replace(leaf, parts=tuple(parts))


def read_adapter(directory: str | os.PathLike, config: VLMConfig, base: str = "the base model") -> Adapter:
    """The adapter in `directory` for a model of `config`; `base` is what errors call that model.

    CheckpointError for adapters of another kind than LoRA, for tensors that fit no linear of the model (named with the model)
    and for tensors of another size ("made for another base").
    """
    directory = Path(directory)
    table = {(entry.room, entry.key): entry for entry in names.entries(config)}
    pairs: dict[str, dict[int | None, Pair]] = {}
    extra: dict[str, dict[int | None, tuple[Entry, Tensor]]] = {}

    def place(key: str, tensor: Tensor) -> Entry:
        entry = table.get(names.room_and_key(key) or ("", ""))
        if entry is None:
            what = "linear" if ".lora_" in tensor.name else "parameter"
            raise CheckpointError(f"{tensor.file} has {tensor.name}, which fits no {what} of {base}")
        return entry

    own_tower = (directory / VIT_FOLDER / PEFT_CONFIG).is_file()
    for folder in _folders(directory):
        settings = read_settings(folder / PEFT_CONFIG)
        for linear, a, b in _factors(_weights(folder), folder):
            entry = place(f"{linear}.weight", a)
            if own_tower and folder == directory and entry.room == "tower":
                continue  # the copy that gathering by the name `lora_` leaves there
            pair = _checked(a, b, entry, linear, settings, directory, base)
            pairs.setdefault(entry.path.removesuffix("/kernel"), {})[entry.layer] = pair
    for key, tensor in _whole(directory):
        entry = place(key, tensor)
        if tensor.shape != entry.shape:
            raise CheckpointError(_other_base(directory, tensor, base, entry.shape))
        extra.setdefault(entry.path, {})[entry.layer] = (entry, tensor)
    if not pairs:
        raise CheckpointError(f"{directory} has no pair of lora_A and lora_B: it is no LoRA adapter")
    counts: dict[str, int] = {}
    for entry in table.values():
        counts[entry.path] = counts.get(entry.path, 0) + 1
    leaves = {}
    for path, by_layer in pairs.items():
        leaves |= _leaves(path, by_layer, counts[f"{path}/kernel"])
    return Adapter(directory, _groups(pairs), leaves, extra)


def vocabulary(directory: Path) -> int | None:
    """Rows of the embedding that an adapter brings along; None if it has none."""
    for key, tensor in _whole(directory):
        if names.room_and_key(key) == ("llm", "embed_tokens.weight"):
            return tensor.shape[0]
    return None


def read_settings(file: Path) -> Settings:
    """adapter_config.json; CheckpointError for anything but plain LoRA."""
    raw = read_json(file)
    if raw.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{file} is of an adapter of kind {raw['peft_type']}: only LORA is supported")
    other = next((key for key in OTHER_KINDS if raw.get(key)), None)
    if other:
        raise CheckpointError(
            f"{file} has {other}={raw[other]!r}: {OTHER_KINDS[other]} are not plain LoRA, merge the adapter with peft"
        )
    start = str(raw.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGED_BASE):
        raise CheckpointError(
            f"{file} has init_lora_weights={start!r}, which alters the base's weights too: "
            "save the adapter with peft's path_initial_model_for_weight_conversion"
        )
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{file} has r={rank!r}: the rank must be at least 1")
    patterns = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    dropout, rslora = float(raw.get("lora_dropout") or 0.0), bool(raw.get("use_rslora"))
    return Settings(rank, float(alpha), dropout, rslora, *patterns)


def _folders(directory: Path) -> list[Path]:
    """The directory and its folder for the tower, as far as there are adapters in them."""
    return [folder for folder in (directory, directory / VIT_FOLDER) if (folder / PEFT_CONFIG).is_file()]


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors beside an adapter_config.json."""
    for name, read in zip(WEIGHTS, (read_file, read_tensors)):
        if (folder / name).is_file():
            return read(folder / name)
    raise CheckpointError(f"{folder} has {PEFT_CONFIG} but no weights: it needs {' or '.join(WEIGHTS)}")


def _factors(found: Mapping[str, Tensor], folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name of the linear in the base, A, B) of every pair."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        match = PAIR.fullmatch(name)
        if match:
            pairs.setdefault(match["linear"].removeprefix(WRAPPED), {})[match["factor"]] = tensor
        elif ".lora_" in name:
            raise CheckpointError(f"{tensor.file} has {name}: only lora_A and lora_B of linears are supported")
    for linear, pair in pairs.items():
        if len(pair) == 1:
            ((here, tensor),) = pair.items()
            missing = "lora_B" if here == "A" else "lora_A"
            raise CheckpointError(f"{tensor.file} has {tensor.name} without its {missing}: copy {folder} again")
        yield linear, pair["A"], pair["B"]


def _whole(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(key in the base, tensor) of what was trained whole: modules_to_save, biases, and LLaVA's files of such tensors."""
    found = {name: tensor for folder in _folders(directory) for name, tensor in _weights(folder).items()}
    for name in TRAINED:
        found |= read_tensors(directory / name) if (directory / name).is_file() else {}
    for name, tensor in found.items():
        # beside a module that was trained, bias=all also gathers its untrained original
        if ".lora_" not in name and ".original_module." not in name and not names.IGNORED.fullmatch(name):
            yield COPY.sub("", name.removeprefix(WRAPPED)), tensor


def _checked(a: Tensor, b: Tensor, entry: Entry, linear: str, settings: Settings, directory: Path, base: str) -> Pair:
    """The pair, if it is of the linear `entry` of the base and of the rank that the settings say."""
    if entry.layout is not TRANSPOSE or len(entry.shape) != 2 or not entry.key.endswith(".weight"):
        raise CheckpointError(f"{a.file} has {a.name}, but {entry.path} of {base} is no linear")
    rank, alpha = settings.of(linear)
    for tensor, axis, wanted in ((a, 1, entry.shape[1]), (b, 0, entry.shape[0])):
        if len(tensor.shape) != 2 or tensor.shape[axis] != wanted:
            shape = [wanted, tensor.shape[1 - axis]] if axis == 0 else [tensor.shape[0], wanted]
            raise CheckpointError(_other_base(directory, tensor, base, shape))
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{a.file}: {a.name} has rank {a.shape[0]} and its lora_B {b.shape[1]}, but {PEFT_CONFIG} says {rank}: "
            "one of the two files belongs to another adapter"
        )
    return Pair(a, b, rank, alpha, settings)


def _other_base(directory: Path, tensor: Tensor, base: str, shape: Any) -> str:
    return (
        f"{directory} is an adapter made for another base: {tensor.name} has shape {list(tensor.shape)}, "
        f"for {base} it should have {list(shape)}"
    )


def _leaves(path: str, pairs: Mapping[int | None, Pair], layers: int) -> dict[str, Leaf | ArrayLeaf]:
    """lora_a, lora_b and lora_scale of one linear, or of the `layers` that are stacked on it."""
    stacked = None not in pairs
    some = next(iter(pairs.values()))
    rank = max(pair.rank for pair in pairs.values())
    factors: dict[str, list[Tensor]] = {"a": [], "b": []}
    scales = np.ones((layers, rank), np.float32)
    for row, layer in enumerate(range(layers) if stacked else (None,)):
        pair = pairs.get(layer)
        a, b = (pair.a, pair.b) if pair else (_nothing(some.a), _nothing(some.b))
        factors["a"].append(_padded(a, (rank, a.shape[1])))
        factors["b"].append(_padded(b, (b.shape[0], rank)))
        said = pair or some
        scales[row] = said.settings.scale(said.rank, said.alpha)
    return {
        f"{path}/lora_a": Leaf(f"{path}/lora_a", tuple(factors["a"]), TRANSPOSE, stacked),
        f"{path}/lora_b": Leaf(f"{path}/lora_b", tuple(factors["b"]), TRANSPOSE, stacked),
        f"{path}/lora_scale": ArrayLeaf(scales if stacked else scales[0]),
    }


def _nothing(like: Tensor) -> Tensor:
    """Zeros in place of a factor that the adapter has not for this layer."""
    return dataclasses.replace(
        like, name="", file="", read=lambda index: _zeros(resolve(index, like.shape), like.dtype)
    )


def _padded(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """`tensor` with zeros behind it up to `shape`."""
    if tensor.shape == shape:
        return tensor

    def read(index: Index) -> np.ndarray:
        index = resolve(index, shape)
        out = _zeros(index, tensor.dtype)
        inside = tuple(slice(min(i.start, n), min(i.stop, n)) for i, n in zip(index, tensor.shape))
        out[tuple(slice(0, i.stop - i.start) for i in inside)] = tensor.read(inside)
        return out

    return dataclasses.replace(tensor, shape=shape, read=read)


def _zeros(index: Index, dtype: np.dtype) -> np.ndarray:
    return np.zeros([max(0, i.stop - i.start) for i in index], dtype)


def _groups(pairs: Mapping[str, Mapping[int | None, Pair]]) -> tuple[LoRAConfig, ...]:
    """The groups of `VLMConfig.lora`: linears of one rank, alpha and dropout together, each named exactly."""
    found: dict[tuple, list[str]] = {}
    for path, by_layer in pairs.items():
        pair = max(by_layer.values(), key=lambda pair: pair.rank)
        key = (pair.rank, pair.alpha, pair.settings.dropout, pair.settings.rslora)
        found.setdefault(key, []).append(f"^{path}$")
    return tuple(LoRAConfig(tuple(paths), *key) for key, paths in found.items())
