"""Writing adapters: a directory that PEFT loads on LlavaForConditionalGeneration, LLaVA's own layout, or SQ-LLaVA's.

hf (names of transformers 5)   adapter_config.json, adapter_model.safetensors; what was trained whole is modules_to_save
llava                          the same two, config.json, non_lora_trainables.bin for what was trained whole
sq_llava                       as llava, the tower's pairs in Vit-lora/ with names below the tower
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import LoRAConfig, VLMConfig
from vlm_jax.convert import names as naming
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.files import staging, write_json
from vlm_jax.convert.hf_config import vlm_to_hf
from vlm_jax.convert.llava_config import vlm_to_llava
from vlm_jax.convert.manifest import MARKED, PEFT_CONFIG, VIT_FOLDER, image_settings, mark_of, write_manifest
from vlm_jax.convert.names import Entry
from vlm_jax.convert.peft import TRAINED, WEIGHTS, WRAPPED
from vlm_jax.convert.peft_config import Linear, peft_config
from vlm_jax.convert.processor_files import preprocessor_config, processor_config
from vlm_jax.convert.shards import Planned, write_file
from vlm_jax.convert.tensors import DTYPES, CheckpointError, as_leaves
from vlm_jax.convert.tokenizer_files import COPIED
from vlm_jax.convert.write import plan

LAYOUTS = {"hf": "hf_5", "hf_4.52": "hf_4.52", "hf_5": "hf_5", "llava": "llava", "sq_llava": "llava"}
TOWER = "model.vision_tower."  # SQ-LLaVA's names in Vit-lora begin behind this

Trained = Mapping[str, Collection[int] | None]


def export_adapter(
    directory: str | os.PathLike,
    config: VLMConfig,
    params: Mapping[str, Any],
    *,
    trained: Trained | None = None,
    names: str = "hf",
    dtype: str | None = None,
    base: str | os.PathLike | None = None,
    tokens: Mapping[str, int] | None = None,
    tower: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    chat_template: str | None = None,
    start_end: bool = False,
    binary: bool = False,
) -> None:
    """Write the adapter in flat `params` (of a model of `config`, whose `lora` has the groups), all of it or nothing.

    trained: {path: layers, or None for all} of what was trained whole and belongs to the adapter: projector, image_newline,
    biases. names: a key of LAYOUTS. dtype: f32, f16, bf16 (default: as the parameters are). base: directory or Hub name of the
    model that it was trained on. tokens, tower, start_end (`<im_start>` and `<im_end>` stand around images): for llava's
    config.json. tokenizer: folder whose tokenizer files are copied. binary: adapter_model.bin in place of safetensors.
    """
    if names not in LAYOUTS:
        raise CheckpointError(f"names={names!r} is unknown for an adapter: use {', '.join(LAYOUTS)}")
    leaves, layout = as_leaves(params), LAYOUTS[names]
    linears = _linears(config, leaves, layout, dtype)
    if not linears:
        raise CheckpointError(f"{directory} would be empty: the parameters have no adapter")
    whole = _whole(config, leaves, trained or {}, layout, dtype)
    apart = [names == "sq_llava" and linear.entry.room == "tower" for linear in linears]
    main, below = ([x for x, a in zip(linears, apart) if a == wanted] for wanted in (False, True))
    with staging(directory) as stage:
        if main:
            raw = peft_config(config, main, str(base or ""), layout)
            more: list[Planned] = []
            if layout != "llava":
                modules, bias, more = _in_peft(config, leaves, linears, whole, layout)
                raw |= {"modules_to_save": modules or None, "bias": bias}
            _write_pairs(stage, raw, main, more, binary)
        if below:
            (stage / VIT_FOLDER).mkdir()
            short = [dataclasses.replace(x, name=x.name.removeprefix(TOWER)) for x in below]
            _write_pairs(
                stage / VIT_FOLDER, peft_config(config, short, str(base or ""), layout, TOWER), short, [], binary
            )
        if layout == "llava":
            if whole:
                torch_pickle.save(stage / TRAINED[0], {WRAPPED + tensor.name: tensor.read() for _, tensor in whole})
            write_json(stage / "config.json", vlm_to_llava(config, tokens or {}, "float16", tower, start_end))
        else:
            write_json(stage / "preprocessor_config.json", preprocessor_config(config))
            write_json(stage / "processor_config.json", processor_config(config.vision))
        for name in COPIED if tokenizer else ():
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, stage / name)
        if chat_template:
            (stage / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        mark = () if MARKED in (trained or {}) else mark_of(leaves)
        write_manifest(stage, "adapter", base, Path(directory), names=names, image=image_settings(config), mark=mark)


def _linears(config: VLMConfig, leaves: Mapping[str, Any], layout: str, dtype: str | None) -> list[Linear]:
    """Every linear of the model that has a pair which is not all zero."""
    found = []
    for entry in naming.entries(config):
        path = entry.path.removesuffix("/kernel")
        if f"{path}/lora_a" not in leaves or path == entry.path:
            continue
        a, b, scale = (_layer(leaves[f"{path}/{leaf}"], entry) for leaf in ("lora_a", "lora_b", "lora_scale"))
        used = a.astype(bool).any(0) | b.astype(bool).any(1)
        if not used.any():
            continue
        a, b, scale = a[:, used].T, b[used].T, scale[used]
        if (scale != scale[0]).any():  # several adapters mixed into one: PEFT has one factor for all ranks
            b, scale = (b * scale).astype(b.dtype), np.ones_like(scale)
        if dtype:
            a, b = a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype])
        name = naming.key_of(entry, layout, config.projector.kind).removesuffix(".weight")
        found.append(Linear(entry, name, a, b, float(scale[0]), _group(config, path)))
    return found


def _layer(leaf: Any, entry: Entry) -> np.ndarray:
    """The values of one layer (or the only ones) of a leaf."""
    if entry.layer is None:
        return np.asarray(leaf.read())
    return np.asarray(leaf.read((slice(entry.layer, entry.layer + 1),)))[0]


def _group(config: VLMConfig, path: str) -> LoRAConfig:
    """The group of adapters that the linear at `path` belongs to."""
    for group in config.lora:
        if any(re.search(pattern, path) for pattern in group.targets):
            return group
    raise CheckpointError(f"{path} has an adapter, but no group of model.lora matches it")


def _whole(
    config: VLMConfig, leaves: Mapping[str, Any], trained: Trained, layout: str, dtype: str | None
) -> list[tuple[Entry, Planned]]:
    """What was trained whole, under the base's names."""
    chosen = []
    for entry in naming.entries(config):
        if entry.path in trained and (trained[entry.path] is None or entry.layer in trained[entry.path]):
            if entry.path.endswith("/kernel") and entry.path.removesuffix("kernel") + "lora_a" in leaves:
                raise CheckpointError(
                    f"{entry.path} was trained whole and has an adapter: such a model is exported merged, not as an adapter"
                )
            chosen.append(entry)
    lost = trained.keys() - {entry.path for entry in chosen}
    if lost:
        raise CheckpointError(f"{min(lost)} was trained whole, but a model of this config has no such parameter")
    return list(zip(chosen, plan(config, leaves, layout, dtype, entries=chosen)))


def _in_peft(
    config: VLMConfig, leaves: Mapping[str, Any], linears: list[Linear], whole: list[tuple[Entry, Planned]], layout: str
) -> tuple[list[str], str, list[Planned]]:
    """(modules_to_save, bias, tensors under PEFT's names) of what was trained whole.

    A bias alone is a matter of `bias`; anything else is a module to save, which PEFT replaces with all its tensors.
    """
    vlm_to_hf(
        config, 0, {}, "float32"
    )  # raises for what LlavaForConditionalGeneration cannot express, image_newline too
    adapted = {linear.name for linear in linears}
    mine = {tensor.name: tensor for _, tensor in whole}
    modules = {name.rpartition(".")[0] for name in mine if not name.endswith(".bias")}
    saved, biases = {}, {}
    for entry in naming.entries(config) if whole else ():
        name = naming.key_of(entry, layout, config.projector.kind)
        module = name.rpartition(".")[0]
        if module in modules:
            saved[WRAPPED + name] = mine.get(name) or plan(config, leaves, layout, entries=[entry])[0]
        elif name in mine:
            inside = f"{module}.base_layer.bias" if module in adapted else name
            biases[WRAPPED + inside] = mine[name]
    bias = "none" if not biases else "lora_only" if all(".base_layer." in name for name in biases) else "all"
    projector = [name for name in modules if ".multi_modal_projector." in name]
    if len(projector) == config.projector.depth:
        modules = modules - set(projector) | {"multi_modal_projector"}
    return sorted(modules), bias, [tensor._replace(name=name) for name, tensor in (saved | biases).items()]


def _write_pairs(
    folder: Path, raw: Mapping[str, Any], linears: Iterable[Linear], more: Iterable[Planned], binary: bool
) -> None:
    """adapter_config.json and the weights: pairs, then `more` tensors."""
    tensors = []
    for linear in linears:
        for factor, value in (("A", linear.a), ("B", linear.b)):
            name = f"{WRAPPED}{linear.name}.lora_{factor}.weight"
            tensors.append(Planned(name, value.shape, value.dtype, lambda value=value: np.ascontiguousarray(value)))
    tensors += more
    if binary:
        torch_pickle.save(folder / WEIGHTS[1], {tensor.name: tensor.read() for tensor in tensors})
    else:
        write_file(folder / WEIGHTS[0], tensors)
    write_json(folder / PEFT_CONFIG, raw)
