"""Writing models: LlavaForConditionalGeneration directories, original LLaVA directories, and
`mm_projector.bin`.

    params {path: array or leaf}  --one tensor at a time-->  model*.safetensors
                                                             + config.json, processor and tokenizer files

The default names (`hf`) are those that transformers published from 4.36 to 4.51 and that every version since
reads; what 5.23 writes for a new model (`hf_5_saved`) is not read by 4.x. `source` gives the names, and
without `dtype` the very bytes, of the checkpoint that the model came from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import VLMConfig
from vlm_jax.convert import names as naming
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.files import staging, write_json
from vlm_jax.convert.hf_config import vlm_to_hf
from vlm_jax.convert.llava_config import describe_tower, known_tower, vlm_to_llava
from vlm_jax.convert.manifest import write_manifest
from vlm_jax.convert.merge import merged_parameters
from vlm_jax.convert.names import Entry
from vlm_jax.convert.parts import complete_parts, naming_of_parts, write_parts
from vlm_jax.convert.processor_files import CHAT_TEMPLATE, START_END, preprocessor_config, processor_config
from vlm_jax.convert.read import Checkpoint
from vlm_jax.convert.shards import Planned, write_directory
from vlm_jax.convert.t5_config import TOKENS as T5_TOKENS
from vlm_jax.convert.tensors import (
    DTYPES,
    TORCH_NAMES,
    CheckpointError,
    Index,
    Leaf,
    Tensor,
    as_leaves,
    full,
    grown,
    resolve,
)
from vlm_jax.convert.tokenizer_files import COPIED, MODELS, TokenizerFiles, for_export

PROCESSOR = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json")
TEXT_ROWS = ("llm/embed/embedding", "llm/head/kernel")
ROUND = 64  # a grown vocabulary is padded to a multiple of this, as the published checkpoints are


def export(
    directory: str | os.PathLike,
    config: VLMConfig,
    params: Mapping[str, Any],
    *,
    names: str = "hf",
    dtype: str | None = None,
    max_shard: int = 5 * 10**9,
    source: Checkpoint | None = None,
    tokenizer: str | os.PathLike | None = None,
    image_token: int | None = None,
    tokens: Mapping[str, int] | None = None,
    chat_template: str | None = None,
    tower: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the model of `config` and flat `params` to `directory`, all of it or nothing; adapters are merged into it.

    params: {path: numpy or jax array, or anything with shape, dtype and read(index)}; tower parameters that
    no computation needs may be missing and are then neutral. names: hf, hf_4.52, hf_5, hf_5_saved
    (LlavaForConditionalGeneration), llava (the original program), parts (convert.parts) or source; an encoder-decoder
    has one naming, clip_t5 (CLIP-FlanT5's, whose T5 has the names of T5ForConditionalGeneration), parts, or source. dtype: f32,
    f16, bf16 (default: as the parameters are). max_shard: bytes. source: the checkpoint that the model came from; its tokenizer,
    processor and generation files are copied. tokenizer: directory of the tokenizer; for hf names `<image>`
    and `<pad>` are added to it and the vocabulary grows to hold them. image_token: id of the image token when
    there is no tokenizer (default: a new row after the vocabulary). tokens: bos_token_id, eos_token_id,
    pad_token_id. tower: what an original config.json names as mm_vision_tower. progress(done, total): bytes
    written.
    """
    if names not in ("source", "parts", *naming.NAMINGS, *naming.T5_NAMINGS):
        raise CheckpointError(f"names={names!r} is unknown: use source, parts, {', '.join(naming.NAMINGS)}")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r} is unknown: use {', '.join(DTYPES)}")
    config, leaves = merged_parameters(config, params)
    names = _naming_for(config, names)
    if names == "source":
        config_json = _source_config(source, config, dtype)
        extra = None
    else:
        tokens = dict(tokens or (source.tokens if source else {}))
        extra = _tokenizer(names, tokenizer, source)
        stored = TORCH_NAMES[DTYPES[dtype] if dtype else _main_dtype(leaves)]
        if names in naming.ORIGINAL:
            config_json = _original_config(config, tokens, stored, tower, source)
        else:
            if image_token is None:
                image_token = extra.image_token if extra else source.image_token if source else None
            config, image_token, tokens = _with_special_tokens(config, image_token, tokens, extra)
            config_json = vlm_to_hf(config, image_token, tokens, stored)
    planned = functools.partial(plan, config, leaves, names, dtype, source)
    with staging(directory) as stage:
        if names in naming.PART_NAMINGS:
            said = write_parts(stage, config, planned, tokens, stored, max_shard, progress)
        else:
            write_directory(stage, planned(), max_shard, progress)
            said = {}
        _write_files(stage, config, names, source, tokenizer, extra, tokens, chat_template)
        complete_parts(stage, said)
        write_json(stage / "config.json", config_json)
        write_manifest(stage, "model", **said)


def _original_config(
    config: VLMConfig, tokens: Mapping[str, Any], stored: str, tower: str | None, source: Checkpoint | None
) -> dict[str, Any]:
    """config.json of the original program; a tower that is none of the known ones is described, though it may have a name as well:
    its weights are here, and elsewhere the name may mean nothing.
    """
    made = vlm_to_llava(config, tokens, stored, tower, _start_end(source))
    return made if known_tower(config.vision) else {**made, "vision_config": describe_tower(config.vision)}


def _naming_for(config: VLMConfig, names: str) -> str:
    """The naming in which a model of `config` is written when `names` is asked for."""
    if names == "clip_t5" and not config.encoder_decoder:
        raise CheckpointError(
            "names=clip_t5 is the layout of models on T5, this model has a decoder: export with names=hf"
        )
    if names == "parts":
        return naming_of_parts(config)
    return "clip_t5" if config.encoder_decoder and names != "source" else names


def export_projector(
    path: str | os.PathLike, config: VLMConfig, params: Mapping[str, Any], dtype: str | None = None
) -> None:
    """Write the projector alone as LLaVA's stage 1 does: a torch file with keys `model.mm_projector.0.weight`
    and so on.
    """
    leaves = as_leaves({path: value for path, value in params.items() if path.startswith("projector/")})
    if not leaves:
        raise CheckpointError(
            f"{path} would be empty: a model with projector {config.projector.kind} has no projector parameters"
        )
    names = _naming_for(config, "llava")
    planned = plan(config, leaves, names, dtype, entries=naming.entries(config, ("projector",)))
    torch_pickle.save(path, {tensor.name: tensor.read() for tensor in planned})


def plan(
    config: VLMConfig,
    leaves: Mapping[str, Any],
    names: str,
    dtype: str | None = None,
    source: Checkpoint | None = None,
    entries: Iterable[Entry] | None = None,
) -> list[Planned]:
    """Every tensor to write (of `entries`, default: the whole model): name, shape, type, and a function that
    reads its values; a missing parameter raises.
    """
    planned = []
    for entry in naming.entries(config) if entries is None else entries:
        leaf = leaves.get(entry.path)
        if leaf is None and not entry.optional:
            raise CheckpointError(f"the parameters lack {entry.path}, which a model of this config has")
        name = _source_name(source, entry) if names == "source" else naming.key_of(entry, names, config.projector.kind)
        if name:
            kind = DTYPES[dtype] if dtype else _stored(leaf, entry)
            planned.append(Planned(name, entry.shape, kind, _reader(entry, leaf, kind)))
    return planned


def _stored(leaf: Any, entry: Entry) -> np.dtype:
    """The type that a tensor has now; the layers of one stack may differ in a checkpoint."""
    if leaf is None:
        return DTYPES["f32"]
    return leaf.parts[entry.layer or 0].dtype if isinstance(leaf, Leaf) else leaf.dtype


def _reader(entry: Entry, leaf: Any, dtype: np.dtype) -> Callable[[], np.ndarray]:
    """A function that reads one tensor in the file's layout."""
    if leaf is None:
        return lambda: np.full(entry.shape, float(entry.path.endswith("/scale")), dtype)
    ours = entry.layout.shape(entry.shape)
    stacked = entry.layer is not None
    held = leaf.shape[1:] if stacked else leaf.shape
    vocab_axis = 0 if entry.path == TEXT_ROWS[0] else 1
    if entry.path in TEXT_ROWS and held != ours and held[1 - vocab_axis] == ours[1 - vocab_axis]:
        whole = _as_tensor(entry, leaf)
        return lambda: grown(whole, entry.shape[0]).read(full(entry.shape)).astype(dtype)
    if held != ours:
        raise CheckpointError(
            f"parameter {entry.path} has shape {list(leaf.shape)}, by the config each tensor in it should "
            f"have {list(ours)}"
        )

    def read() -> np.ndarray:
        values = leaf.read((slice(entry.layer, entry.layer + 1),))[0] if stacked else leaf.read()
        return entry.layout.write(np.asarray(values), entry.shape).astype(dtype, copy=False)

    return read


def _as_tensor(entry: Entry, leaf: Any) -> Tensor:
    """Embedding or head as a (V, D) tensor that can be read by slices."""
    transposed = entry.layout.kind == "transpose"
    shape = leaf.shape[::-1] if transposed else leaf.shape

    def read(index: Index) -> np.ndarray:
        index = resolve(index, shape)
        return np.asarray(leaf.read(index[::-1])).T if transposed else np.asarray(leaf.read(index))

    return Tensor(entry.path, tuple(shape), leaf.dtype, "", read)


def _main_dtype(leaves: Mapping[str, Any]) -> np.dtype:
    """The type of most of the bytes."""
    sizes: dict[np.dtype, int] = {}
    for leaf in leaves.values():
        sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + math.prod(leaf.shape)
    main = max(sizes, key=sizes.get)
    return main if main in TORCH_NAMES else DTYPES["f32"]


def _source_name(source: Checkpoint, entry: Entry) -> str:
    """The key that a tensor had in the source; empty for one that the source did not have."""
    leaf = source.leaves.get(entry.path)
    if leaf is None:
        raise CheckpointError(f"{source.directory} had no {entry.path}: export with names=hf")
    return leaf.parts[entry.layer or 0].name


def _source_config(source: Checkpoint | None, config: VLMConfig, dtype: str | None) -> dict[str, Any]:
    """The source's own config.json, with its dtype changed if asked for."""
    if source is None or source.naming is None or source.config != config:
        raise CheckpointError(
            "names=source needs a model that came whole and unchanged in size from one LLaVA directory: "
            "export with names=hf"
        )
    raw = dict(source.raw)
    if dtype:
        raw["dtype" if "dtype" in raw else "torch_dtype"] = TORCH_NAMES[DTYPES[dtype]]
    return raw


def _tokenizer(names: str, tokenizer: str | os.PathLike | None, source: Checkpoint | None) -> TokenizerFiles | None:
    """Tokenizer files with the image token, for an HF export of a model whose tokenizer has none yet."""
    if names in naming.ORIGINAL:
        return None
    directory = Path(tokenizer) if tokenizer else source.directory if source and source.kind != "llava_hf" else None
    if directory is None or not (tokenizer or any((directory / name).is_file() for name in MODELS)):
        return None
    return for_export(directory)


def _with_special_tokens(
    config: VLMConfig, image_token: int | None, tokens: dict[str, Any], extra: TokenizerFiles | None
) -> tuple[VLMConfig, int, dict[str, Any]]:
    """The config with rows for the image and pad tokens, padded as the published checkpoints are, and the
    ids.
    """
    if extra is not None:
        tokens = {**extra.tokens, **tokens, "pad_token_id": extra.tokens["pad_token_id"]}
    image_token = config.llm.vocab if image_token is None else image_token
    rows = max(image_token, tokens.get("pad_token_id") or 0) + 1
    if rows > config.llm.vocab:
        config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=-(-rows // ROUND) * ROUND))
    return config, image_token, tokens


def _write_files(
    stage: Path,
    config: VLMConfig,
    names: str,
    source: Checkpoint | None,
    tokenizer: str | os.PathLike | None,
    extra: TokenizerFiles | None,
    tokens: Mapping[str, Any] | None,
    chat_template: str | None,
) -> None:
    """Everything beside weights and config.json: what the source has is copied, the rest is made."""
    origin = Path(tokenizer) if tokenizer else source.directory if source else None
    same_family = source is not None and (
        names == "source" or (source.kind == "llava_hf") == (names not in naming.ORIGINAL)
    )
    copied = set(COPIED if extra is None and origin is not None else ())
    for name in sorted(copied):
        if (origin / name).is_file():
            shutil.copyfile(origin / name, stage / name)
    unchanged = PROCESSOR if source is not None and source.naming else ()  # another tower needs another image processor
    for name in ("generation_config.json", *unchanged) if same_family else ():
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, stage / name)
    for name, content in (extra.files if extra else {}).items():
        (stage / name).write_bytes(content)
    chat_template = chat_template or _dialogue(source)
    if chat_template:  # kept in the original format too: it says how dialogues are written for this model
        (stage / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if names == "source":
        return
    if not (stage / "generation_config.json").is_file():
        write_json(
            stage / "generation_config.json", {**(T5_TOKENS if config.encoder_decoder else {}), **(tokens or {})}
        )
    if names == "llava" or any((stage / name).is_file() for name in PROCESSOR[:2]):
        return
    write_json(stage / "preprocessor_config.json", preprocessor_config(config))
    if names in naming.ORIGINAL:
        return
    write_json(stage / "processor_config.json", processor_config(config.vision))
    if not chat_template:
        made = CHAT_TEMPLATE.replace("<image>", START_END) if _start_end(source) else CHAT_TEMPLATE
        (stage / "chat_template.jinja").write_text(made, encoding="utf-8")


def _start_end(source: Checkpoint | None) -> bool:
    """Whether the model was trained with tokens around its images."""
    return source is not None and bool(source.raw.get("mm_use_im_start_end") or START_END in _dialogue(source))


def _dialogue(source: Checkpoint | None) -> str:
    """The chat template beside a checkpoint, empty without one."""
    file = source.directory / "chat_template.jinja" if source else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
