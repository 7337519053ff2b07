"""Which tensor of an RQ- or HQ-Transformer's checkpoint is which of our arrays, and both ways between them.

    ours                                         RQ                                    HQ
    body/blocks, head/blocks, embedder/blocks    {body,head}_transformer.blocks.i      blocks.i, depths.i, emb_blocks.i
    .../attn/q k v o, mlp/up down, norm1 norm2   .attn.{query,key,value,proj}, .mlp.0 .mlp.2, .ln1 .ln2
    condition, {condition,token,depth}_position  cond_emb, pos_emb_cond, _hw, _d
    input, context, tokens                       input_mlp, head_mlp, tok_emb
    norm, classifier, text_norm text_classifier  classifier.*, cond_classifier.*
    classes or start, text, text_{position,norm,head}                                  sos, tok_emb_txt, {pos_emb,ln,head}_txt
    position, {row,column}_position, slot_position, child_scale                        pos_emb_top(_h, _w), pos_emb_emb, pos_emb_bot
    norm, head_start                                                                   ln_f, sos_depth
    tokens_l, head_tokens_l, norm_l, head_l      two levels: {tok_emb,tok_emb_depth,ln,head} with top, bot; three: *_levels.l
    head_position_l                              two levels: pos_emb_depth; three: pos_emb_depths.l

Kernels are (in, out), theirs (out, in); theirs of a head per depth is (depth, in, out) as ours. Vectors may have leading ones there.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers.priors.hierarchy_options import HQTransformerConfig, RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.models import Config, shapes

OFFSETS = "tok_emb.offsets"  # where each depth's rows begin in RQ's table of all depths: written, not read

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_BLOCK = {
    "attn/q": "attn.query", "attn/k": "attn.key", "attn/v": "attn.value", "attn/o": "attn.proj",
    "mlp/up": "mlp.0", "mlp/down": "mlp.2", "norm1": "ln1", "norm2": "ln2",
}  # fmt: skip
_RQ = {
    "body": "body_transformer.blocks", "head": "head_transformer.blocks",
    "condition": "cond_emb", "condition_position": "pos_emb_cond", "token_position": "pos_emb_hw", "depth_position": "pos_emb_d",
    "input": "input_mlp", "context": "head_mlp", "tokens": "tok_emb",
    "norm": "classifier.layer_norm", "classifier": "classifier.linear",
    "text_norm": "cond_classifier.layer_norm", "text_classifier": "cond_classifier.linear",
}  # fmt: skip
_HQ = {
    "body": "blocks", "head": "depths", "embedder": "emb_blocks", "classes": "sos", "start": "sos", "text": "tok_emb_txt",
    "text_position": "pos_emb_txt", "text_norm": "ln_txt", "text_head": "head_txt",
    "position": "pos_emb_top", "row_position": "pos_emb_top_h", "column_position": "pos_emb_top_w",
    "slot_position": "pos_emb_emb", "child_scale": "pos_emb_bot", "norm": "ln_f", "head_start": "sos_depth",
}  # fmt: skip
_LEVELS = {"tokens": "tok_emb", "head_tokens": "tok_emb_depth", "norm": "ln", "head": "head"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint, its shape there, and the parameter (of block `layer`) that it is; turned: transposed."""

    key: str
    shape: tuple[int, ...]
    path: str
    layer: int | None = None
    turned: bool = False


@functools.cache
def entries(config: Config) -> tuple[Entry, ...]:
    """Every tensor of a checkpoint of `config` but OFFSETS."""
    found = []
    for path, made in shapes(config).items():
        part, _, leaf = path.rpartition("/")
        module, blocks, inner = (part or leaf).partition("/blocks/")
        key, shape = _key(module, config), tuple(made.shape[1:] if blocks else made.shape)
        turned = leaf == "kernel" and len(shape) == 2
        if not part:  # a bare vector or table
            lead = 2 if module == "child_scale" else 1
            found.append(Entry(key, (1,) * lead + shape, path))
        elif not blocks:
            found.append(Entry(f"{key}.{_LEAVES[leaf]}", shape[::-1] if turned else shape, path, None, turned))
        else:
            for i in range(made.shape[0]):
                name = f"{key}.{i}.{_BLOCK[inner]}.{_LEAVES[leaf]}"
                found.append(Entry(name, shape[::-1] if turned else shape, path, i, turned))
    return tuple(found)


def _key(module: str, config: Config) -> str:
    if isinstance(config, RQTransformerConfig):
        return _RQ[module]
    level = re.fullmatch(r"(\w+)_(\d)", module)
    if level is None:
        return _HQ[module]
    kind, number = level[1], int(level[2])
    if kind == "head_position":
        return "pos_emb_depth" if config.levels == 2 else f"pos_emb_depths.{number}"
    if config.levels == 3:
        return f"{_LEVELS[kind]}_levels.{number}"
    side = ("top", "bot")[number]
    return f"tok_emb_{side}_depth" if kind == "head_tokens" else f"{_LEVELS[kind]}_{side}"


def read(config: Config, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our float32 parameters of a checkpoint of `config`; raises ConfigError naming a tensor that is absent or of another shape."""
    made: dict[str, list[np.ndarray]] = {}
    wanted = shapes(config)
    for entry in entries(config):
        if entry.key not in tensors:
            raise ConfigError(f"the checkpoint has no tensor {entry.key}: it is not of this prior's config")
        theirs = np.asarray(tensors[entry.key], np.float32)
        if theirs.shape != entry.shape:
            raise ConfigError(f"{entry.key} has shape {theirs.shape}, but this prior's config needs {entry.shape}")
        whole = wanted[entry.path].shape
        ours = theirs.T if entry.turned else theirs.reshape(whole if entry.layer is None else whole[1:])
        made.setdefault(entry.path, []).append(ours)
    return {path: np.stack(parts) if "/blocks/" in path else parts[0] for path, parts in made.items()}


def write(config: Config, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The original checkpoint's tensors of our parameters: inverse of `read`."""
    out = {}
    for entry in entries(config):
        ours = np.asarray(params[entry.path] if entry.layer is None else params[entry.path][entry.layer])
        out[entry.key] = np.ascontiguousarray(ours.T if entry.turned else ours).reshape(entry.shape)
    if isinstance(config, RQTransformerConfig) and "tok_emb.weight" in out and not config.shared_tokens:
        out[OFFSETS] = np.arange(config.depth, dtype=np.int64) * config.codes
    return out


def unwrapped(found: Mapping[str, Any], config: Config, averaged: bool = False) -> Mapping[str, Any]:
    """The state dict inside what a training program saved, or `found` itself where it is one.

    averaged: the moving average of RQ's weights, where there is one. HQ's programs keep the prior beside its tokenizer, as stage2.
    """
    name = "state_dict_ema" if averaged else "state_dict"
    if averaged and name not in found:
        raise ConfigError("the checkpoint has no averaged weights (state_dict_ema)")
    state = found[name] if isinstance(found.get(name), Mapping) else found
    if isinstance(config, HQTransformerConfig) and any(key.startswith("stage2.") for key in state):
        return {key.removeprefix("stage2."): value for key, value in state.items() if key.startswith("stage2.")}
    return state
