"""Opening checkpoints: which of our parameters are in them, read slice by slice when they are asked for.

    open_checkpoint(DIR, vision=..., llm=..., projector=...) -> Checkpoint(config, leaves)
    load(checkpoint, place)                                  -> {path: place(path, shape, dtype, read)}

Nothing is read before `place` calls `read(index)`, which is what `jax.make_array_from_callback` wants: a host
touches only the slices of its own devices, one layer at a time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import VLMConfig
from vlm_jax.convert import names
from vlm_jax.convert.combine import combined_config
from vlm_jax.convert.files import read_json
from vlm_jax.convert.llava_config import tower_directory
from vlm_jax.convert.manifest import read_manifest, refuse_other
from vlm_jax.convert.names import Entry
from vlm_jax.convert.shards import read_directory, read_file
from vlm_jax.convert.tensors import DTYPES, CheckpointError, Index, Leaf, Tensor, grown, resolve
from vlm_jax.convert.torch_pickle import read_tensors

Pool = dict[tuple[str, str], Tensor]
Place = Callable[[str, tuple[int, ...], np.dtype, Callable[[Index], np.ndarray]], Any]

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
FLAGS = {"tower": "--vision", "projector": "--projector", "llm": "--llm"}
WHAT = {
    "tower": "vision tower",
    "projector": "projector",
    "llm": "language model",
    "head": "lm_head",
    "newline": "image_newline",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in files. `kind`: llava_hf, llava or llm (what `directory` holds); `naming`: see
    `names.NAMINGS`, None if combined.

    `missing` are paths without tensors (only with `partial`); `raw` is the config.json of `directory`;
    `image_token` the id that HF prompts use for an image, None if the model was never given one; `tokens` the
    bos/eos/pad ids that its config states.
    """

    directory: Path
    kind: str
    config: VLMConfig
    leaves: dict[str, Leaf]
    missing: tuple[str, ...]
    naming: str | None
    raw: dict[str, Any]
    image_token: int | None
    tokens: dict[str, Any]

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """The slice `index` (default: all) of parameter `path`."""
        return self.leaves[path].read(index)

    @property
    def dtype(self) -> np.dtype:
        """The type of most of its bytes."""
        sizes: dict[np.dtype, int] = {}
        for leaf in self.leaves.values():
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + int(np.prod(leaf.shape))
        return max(sizes, key=sizes.get)


def open_checkpoint(
    directory: str | os.PathLike,
    *,
    vision: str | os.PathLike | None = None,
    llm: str | os.PathLike | None = None,
    projector: str | os.PathLike | None = None,
    config: VLMConfig | None = None,
    vocab: int | None = None,
    partial: bool = False,
) -> Checkpoint:
    """Open a LLaVA directory (HF port, any naming; original program) or a language model, with parts taken
    from elsewhere.

    vision: directory of a CLIP or SigLIP tower; llm: of a Llama or Mistral model; projector:
    `mm_projector.bin`, its folder, or a LLaVA directory. config: the model wanted (default: as the files
    say); tensors of another size then raise. vocab: rows that embedding and head shall have; new rows are the
    mean of the old ones. partial: parts that are nowhere become `missing` instead of an error.
    """
    main = Path(directory)
    refuse_other(main)
    raw = read_json(main / "config.json")
    kind = kind_of(raw, main)
    parts = {part: main / place for part, place in read_manifest(main).parts.items()}
    if kind == "llava" and not parts:
        vision = vision or _named_tower(raw, main)
    given = {"tower": vision or parts.get("vision"), "llm": llm or parts.get("llm")}
    given["projector"] = projector or parts.get("projector")
    sources = {part: path and Path(path) for part, path in given.items()}
    pool, found = _collect(None if parts else main, sources)
    wanted = config or combined_config(kind, raw, main, sources, found, partial)
    if config is None:
        has_head = any(room == "tower" and key.startswith("head.") for room, key in pool)
        wanted = dataclasses.replace(wanted, vision=dataclasses.replace(wanted.vision, pooler_head=has_head))
    if wanted.encoder_decoder:
        pool = _t5_tensors(pool, wanted, read_json(sources["llm"] / "config.json") if sources["llm"] else raw)
    if vocab is not None:
        wanted = dataclasses.replace(wanted, llm=dataclasses.replace(wanted.llm, vocab=vocab))
        pool |= {
            at: grown(pool[at], vocab)
            for at in (("llm", "embed_tokens.weight"), ("llm", names.SHARED.key), ("head", "weight"))
            if at in pool
        }
    leaves, missing = _leaves(wanted, pool, main, partial)
    text = raw.get("text_config") or raw
    tokens = {name: text.get(name, raw.get(name)) for name in SPECIAL if text.get(name, raw.get(name)) is not None}
    image_token = raw.get("image_token_index", raw.get("image_token_id", 32000)) if kind == "llava_hf" else None
    naming = None if any(sources.values()) else names.naming_of(found["main"])
    return Checkpoint(main, kind, wanted, leaves, missing, naming, raw, image_token, tokens)


def load(checkpoint: Checkpoint, place: Place, paths: Iterable[str] | None = None) -> dict[str, Any]:
    """{path: place(path, shape, dtype, read)} for `paths` (default: all), one parameter after another.

    `place` decides where the array goes, for example
    `lambda path, shape, dtype, read: jax.make_array_from_callback(shape, shardings[path], read)`.
    """
    chosen = checkpoint.leaves if paths is None else paths
    return {
        path: place(path, leaf.shape, leaf.dtype, leaf.read) for path in chosen for leaf in [checkpoint.leaves[path]]
    }


def model_directory(directory: str | os.PathLike) -> Path:
    """`directory` itself, a model's or an adapter's, or the export of the training run that it is (whose own config.json is a
    recipe).
    """
    directory = Path(directory)
    own = directory / "config.json"
    if read_manifest(directory).kind == "adapter":
        return directory
    if own.is_file() and read_json(own).keys() & {"model_type", "mm_vision_tower"}:
        return directory
    export = directory / "export"
    if (export / "config.json").is_file() or read_manifest(export).kind == "adapter":
        return export
    if (directory / "checkpoints").is_dir():
        raise CheckpointError(
            f"{directory} is a training run without an export: write one with "
            f"python -m vlm_jax convert --from {directory} --to {directory / 'export'}"
        )
    if not own.is_file():
        raise CheckpointError(f"{directory} is no model directory: it has no config.json")
    return directory


def kind_of(raw: Mapping[str, Any], directory: Path) -> str:
    """llava_hf, llava or llm, from a config.json; anything else raises."""
    model = str(raw.get("model_type", ""))
    if model == "llava" and ("text_config" in raw or "vision_config" in raw or "mm_vision_tower" not in raw):
        return "llava_hf"
    if model.startswith("llava") or "mm_vision_tower" in raw:
        return "llava"
    if model in ("llama", "mistral", "t5"):
        return "llm"
    hint = ": give it with --vision beside a language model" if "clip" in model or "siglip" in model else ""
    if (directory / "export" / "config.json").is_file():
        hint = f": it is of a training run, whose model is {directory / 'export'}"
    raise CheckpointError(
        f"{directory / 'config.json'} is of model_type {model!r}, not a LLaVA model, Llama, Mistral or T5{hint}"
    )


def _named_tower(raw: Mapping[str, Any], main: Path) -> Path | None:
    """The tower's own directory, when an original LLaVA checkpoint holds no tower tensors and names a
    directory that is here.
    """
    here = tower_directory(str(raw.get("mm_vision_tower") or ""), main)
    if here is None or any((names.room_and_key(name) or ("",))[0] == "tower" for name in _tensors(main)):
        return None
    return here


def _tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a directory or of a single .safetensors, .bin or .pt file."""
    if path.is_dir():
        try:
            return read_directory(path)
        except CheckpointError:
            if (path / "mm_projector.bin").is_file():
                return read_tensors(path / "mm_projector.bin")
            if any(path.glob("adapter_model.*")):
                raise CheckpointError(
                    f"{path} holds the weights of an adapter but no adapter_config.json: copy that file too"
                ) from None
            raise
    return read_file(path) if path.suffix == ".safetensors" else read_tensors(path)


def _collect(main: Path | None, sources: Mapping[str, Path | None]) -> tuple[Pool, dict[str, list[str]]]:
    """Every tensor by (room, key of the table), each room from its source, the others from `main`; and the names found in each
    source. A directory that holds a model in parts has no tensors itself: main is then None.
    """
    rooms = {"tower": ("tower",), "llm": ("llm", "head"), "projector": ("projector", "newline")}
    rest = set(names.ROOMS) - {r for part, path in sources.items() if path for r in rooms[part]}
    plan = [("main", main, rest)] if main else []
    plan += [(part, path, set(rooms[part])) for part, path in sources.items() if path]
    pool: Pool = {}
    found: dict[str, list[str]] = {}
    for part, path, wanted in plan:
        tensors = {name: t for name, t in _tensors(path).items() if not names.IGNORED.fullmatch(name)}
        found[part] = list(tensors)
        placed = {name: names.room_and_key(name) for name in tensors}
        strange = [name for name, at in placed.items() if at is None]
        if strange:
            raise CheckpointError(
                f"{path} is the checkpoint of another model: {_some(strange)} {_belong(strange)} to no part "
                "of a LLaVA model"
            )
        mine = {at: tensors[name] for name, at in placed.items() if at[0] in wanted}
        if not mine:
            raise CheckpointError(
                f"{path} has no tensor of a {WHAT.get(part, 'LLaVA model')}, it has {_some(list(tensors))}"
            )
        pool |= mine
    return pool, found


def _t5_tensors(pool: Pool, config: VLMConfig, raw: Mapping[str, Any]) -> Pool:
    """T5's embedding under its one name; a checkpoint may hold it under several, or under another one alone.

    raw: T5's config.json. From version 5 on transformers makes heads that are the embedding and yet not scaled: there the head is a
    second copy. Of a head that is said to be the embedding and is not, nobody knows whether it is scaled: that is refused.
    """
    shared, head = ("llm", names.SHARED.key), ("head", "weight")
    aliases = [("llm", key) for key in names.ALIASES]
    table = next((pool[at] for at in (shared, *aliases) if at in pool), None)
    rest = {at: tensor for at, tensor in pool.items() if at not in aliases}
    if table is None:
        return rest
    if config.llm.tie and head in pool and not _same_rows(table, pool[head]):
        raise CheckpointError(
            f"{pool[head].file}: lm_head.weight is another tensor than {table.name}, but config.json says that they are tied: "
            "set tie_word_embeddings to false there, as FLAN-T5 has it"
        )
    if not config.llm.tie and head not in pool and raw.get("tie_word_embeddings", True):
        rest[head] = table
    return rest | {shared: table}


def _same_rows(one: Tensor, other: Tensor) -> bool:
    """Whether the first rows of two tables are equal; those of different embeddings never are."""
    few = tuple(slice(0, min(8, n)) for n in one.shape)
    return one.shape == other.shape and np.array_equal(one.read(few), other.read(few))


def _leaves(config: VLMConfig, pool: Pool, main: Path, partial: bool) -> tuple[dict[str, Leaf], tuple[str, ...]]:
    """The pool's tensors stacked into our parameters; they must be those of `config` and no others."""
    parts: dict[str, list[tuple[Entry, Tensor | None]]] = {}
    rooms_here = {room for room, _ in pool}
    for entry in names.entries(config):
        tensor = pool.pop((entry.room, entry.key), None)
        if tensor is not None and tensor.shape != entry.shape:
            raise CheckpointError(
                f"{tensor.file} is the checkpoint of another model: {tensor.name} has shape "
                f"{list(tensor.shape)}, by the config it "
                f"should have {list(entry.shape)}"
            )
        parts.setdefault(entry.path, []).append((entry, tensor))
    _refuse_leftovers(config, pool, main)
    leaves: dict[str, Leaf] = {}
    missing, absent = [], []
    for path, members in parts.items():
        room = members[0][0].room
        if partial and ("llm" if room == "head" else room) not in rooms_here:
            missing.append(path)
            continue
        absent += [entry for entry, tensor in members if tensor is None and not entry.optional]
        tensors = tuple(tensor or _neutral(entry, _dtype_of(members)) for entry, tensor in members)
        leaves[path] = Leaf(path, tensors, members[0][0].layout, members[0][0].layer is not None)
    _refuse_absent(absent, rooms_here, main, "clip_t5" if config.encoder_decoder else "hf")
    return leaves, tuple(missing)


def _dtype_of(members: list[tuple[Entry, Tensor | None]]) -> np.dtype:
    """Type of the tensors of one parameter that are there, float32 if none is."""
    return next((tensor.dtype for _, tensor in members if tensor is not None), DTYPES["f32"])


def _neutral(entry: Entry, dtype: np.dtype) -> Tensor:
    """Stands for a tensor that nothing computes with and the checkpoint lacks: ones for a norm's scale, else
    zeros. It has no name.
    """
    value = float(entry.path.endswith("/scale"))

    def read(index: Index) -> np.ndarray:
        return np.full([i.stop - i.start for i in resolve(index, entry.shape)], value, dtype)

    return Tensor("", entry.shape, dtype, "", read)


def _refuse_leftovers(config: VLMConfig, pool: Pool, main: Path) -> None:
    """Tensors that the config has no place for: only a tied head's copy and SigLIP's pooling head may be
    left.
    """
    rest = [
        tensor.name
        for (room, key), tensor in pool.items()
        if not (room == "head" and config.llm.tie) and not (room == "tower" and key.startswith("head."))
    ]
    if rest:
        raise CheckpointError(
            f"{main} is the checkpoint of another model: by its config it should not have {_some(rest)}"
        )


def _refuse_absent(absent: list[Entry], rooms_here: set[str], main: Path, naming: str) -> None:
    """One sentence for a part that is nowhere, or for single tensors that are not there."""
    for room, flag in FLAGS.items():
        if any(entry.room == room for entry in absent) and room not in rooms_here:
            raise CheckpointError(f"{main} has no {WHAT[room]}: give one with {flag} to python -m vlm_jax convert")
    if absent:
        some = _some([names.key_of(entry, naming) for entry in absent])
        raise CheckpointError(
            f"{main} is incomplete or the checkpoint of another model: by its config it should have {some}"
        )


def _some(names_: list[str]) -> str:
    """The first three names and how many more there are."""
    more = f" and {len(names_) - 3} more" if len(names_) > 3 else ""
    return ", ".join(names_[:3]) + more


def _belong(names_: list[str]) -> str:
    return "belongs" if len(names_) == 1 else "belong"
