"""A run as a directory to ship: at its end, or from its newest checkpoint by `python -m vlm_jax convert --from RUN --to DIR`.

A run that trained adapters becomes an adapter directory (with what it trained whole, such as the projector), or with `merge` a model.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, QuantConfig, VLMConfig
from vlm_jax.convert import command
from vlm_jax.convert.files import read_json
from vlm_jax.convert.manifest import read_manifest
from vlm_jax.convert.merge import open_adapted
from vlm_jax.convert.read import kind_of, model_directory
from vlm_jax.convert.tensors import Index, full, resolve
from vlm_jax.convert.write import export, export_projector
from vlm_jax.convert.write_adapter import export_adapter
from vlm_jax.data.chat_template import chat_template
from vlm_jax.models.adapters import LEAVES
from vlm_jax.models.quantised import kernel_of
from vlm_jax.nn.quantise import KERNEL, is_quantised
from vlm_jax.parallel import hosts
from vlm_jax.recipe import Recipe
from vlm_jax.train.checkpoint import Checkpointer
from vlm_jax.train.loop import Result
from vlm_jax.train.runs import EXPORT, export_target
from vlm_jax.train.state import chosen
from vlm_jax.train.weights import open_tokenizer, tokenizer_folder


def export_result(recipe: Recipe, result: Result, run: Path) -> None:
    """Write run/export at the end of training; several processes leave it to `convert`, which reads the checkpoint on one host."""
    target = export_target(run, result.status, f"export it with: python -m vlm_jax convert --from {run} --to DIR")
    if target:
        write(recipe, recipe.model, result.state.params, target, merge=recipe.merge)
        hosts.say(f"exported to {target}")


def write(
    recipe: Recipe,
    model: VLMConfig,
    params: Mapping[str, Any],
    target: Path,
    *,
    merge: bool = False,
    names: str | None = None,
    dtype: str | None = None,
    max_shard: int = 5 * 10**9,
) -> None:
    """The model, or the adapter that was trained, with its tokenizer, image processor and chat template.

    merge: a model even where adapters were trained. An adapter needs a base to be told apart from: a run whose base is in no
    directory (init.random, a checkpoint with another tower) gives a model too. names, dtype, max_shard: see convert.write.export;
    names default to hf, of an adapter to the format of its base.
    """
    dialogue = chat_template(recipe.data.template, recipe.data.im_start_end)
    base = base_of(recipe) if model.lora and not merge else None
    with tempfile.TemporaryDirectory() as made:
        folder = tokenizer_folder(recipe)
        if recipe.data.im_start_end:  # the run's tokenizer has two tokens more than the one it started from
            open_tokenizer(recipe).save(made)
            folder = Path(made)
        if base is None:
            model, leaves = plain(model, params, recipe.train.frozen_dtype)
            options = {"names": names or "hf", "max_shard": max_shard}
            export(target, model, leaves, tokenizer=folder, chat_template=dialogue, dtype=dtype, **options)
        else:
            raw = read_json(model_directory(base) / "config.json")
            export_adapter(
                target,
                model,
                params,
                trained=trained_whole(recipe, model, params, raw),
                names=names or ("hf" if kind_of(raw, base) == "llava_hf" else "llava"),
                dtype=dtype,
                base=base,
                tokens={name: raw[name] for name in raw if name in ("bos_token_id", "eos_token_id", "pad_token_id")},
                tower=recipe.init.vision or raw.get("mm_vision_tower"),
                tokenizer=folder,
                chat_template=dialogue,
                start_end=recipe.data.im_start_end,
            )


def base_of(recipe: Recipe) -> Path | None:
    """The directory that an adapter of this run is put on: a checkpoint as it is, or a language model with a tower given apart.

    A run that went on with an adapter has the base of that adapter.
    """
    init = recipe.init
    if init.checkpoint:
        start = read_manifest(init.checkpoint)
        found = start.base_directory() if start.kind == "adapter" else Path(init.checkpoint)
        return None if init.vision or init.llm else found
    return Path(init.llm) if init.llm and init.vision else None


def trained_whole(
    recipe: Recipe, model: VLMConfig, params: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, None]:
    """{path: None} of what belongs to an adapter besides its pairs: trained parameters, and what `base`, a config.json, has not."""
    whole = {path for path in chosen(model, recipe.train) if path.rpartition("/")[2] not in LEAVES}
    if recipe.init.projector or not recipe.init.checkpoint:
        whole |= {path for path in params if path.startswith("projector/") or path == "image_newline"}
    if (base.get("text_config") or base).get("vocab_size", 32000) != model.llm.vocab:
        whole |= {path for path in ("llm/embed/embedding", "llm/head/kernel") if path in params}
    if recipe.init.checkpoint and read_manifest(recipe.init.checkpoint).kind == "adapter":
        whole |= open_adapted(recipe.init.checkpoint)[1].extra.keys()  # what the first adapter had trained whole
    return dict.fromkeys(sorted(whole))


def plain(model: VLMConfig, params: Mapping[str, Any], dtype: str) -> tuple[VLMConfig, dict[str, Any]]:
    """(config without quantisation, parameters with kernels of `dtype` in place of codes, dequantised when they are read)."""
    if model.quant is None:
        return model, dict(params)
    leaves = {path: value for path, value in params.items() if not is_quantised(path)}
    for room in {path.rpartition("/")[0] for path in params if is_quantised(path)}:
        codes = {path: params[path] for path in params if path.rpartition("/")[0] == room and is_quantised(path)}
        leaves[f"{room}/{KERNEL}"] = DequantisedLeaf(
            f"{room}/{KERNEL}", codes, model.quant, np.dtype(jax.numpy.dtype(dtype))
        )
    return dataclasses.replace(model, quant=None), leaves


@dataclasses.dataclass(frozen=True)
class DequantisedLeaf:
    """A kernel [(L,) in, out] read from its `codes`, {path: array}, one layer at a time."""

    path: str
    codes: Mapping[str, Any]
    quant: QuantConfig
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        stored = next(
            tuple(x.shape) for path, x in self.codes.items() if path.endswith(("kernel_codes", "kernel_int8"))
        )
        return (*stored[:-2], stored[-2] * (2 if self.quant.kind == "nf4" else 1), stored[-1])

    def read(self, index: Index | None = None) -> np.ndarray:
        """The slice `index` (default: all) of the kernel."""
        index = full(self.shape) if index is None else resolve(index, self.shape)
        if len(self.shape) == 2:
            return kernel_of(self.codes, self.path, self.quant)[index].astype(self.dtype)
        layers = range(self.shape[0])[index[0]]
        out = np.empty((len(layers), *(i.stop - i.start for i in index[1:])), self.dtype)
        for row, layer in enumerate(layers):
            codes = {path: np.asarray(x[layer]) for path, x in self.codes.items()}
            out[row] = kernel_of(codes, self.path, self.quant)[index[1:]].astype(self.dtype)
        return out


def convert(**flags: Any) -> int:
    """The command `convert`: a training run is read from its newest checkpoint, anything else by convert.command."""
    run = Path(flags["from"] or "")
    if not flags["from"] or not (run / "checkpoints").is_dir():
        return command.convert(**flags)
    ignored = [
        name for name in ("vision", "llm", "projector", "tokenizer", "tower", "base", "delta") if flags.get(name)
    ]
    if ignored:
        raise ConfigError(
            f"--{ignored[0]} cannot be used on the run {run}: convert the run first, then the directory it gives"
        )
    recipe = recipes.load(run / "config.json")
    if not isinstance(recipe, Recipe):
        if not (run / EXPORT).is_dir():
            raise ConfigError(f"{run} has no {EXPORT} yet: start its `train` command in one process, which writes it")
        return command.convert(**flags | {"from": str(run / EXPORT)})
    command.check_target(flags["to"], flags["extract"])
    if flags["merge"] and not recipe.model.lora:
        raise ConfigError(f"{run} trained no adapter: --merge has no meaning for it")
    checkpoints = Checkpointer(run / "checkpoints")
    params, meta = checkpoints.params()
    dtype, target = command.parse_dtype(flags["dtype"]), Path(flags["to"])
    if flags["extract"]:
        export_projector(target, *plain(recipe.model, params, recipe.train.frozen_dtype), dtype)
    else:
        size = command.parse_size(flags["max_shard"])
        options = {"names": flags["names"] or None, "dtype": dtype, "max_shard": size}
        write(recipe, recipe.model, params, target, merge=flags["merge"], **options)
    checkpoints.close()
    print(f"{flags['to']}: step {meta['step']} of {run}")
    return 0
