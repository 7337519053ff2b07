"""Which tensor of a LlamaGen prior's checkpoint is which of our arrays, and both ways between them.

    ours                                     original
    condition/table/embedding                cls_embedding.embedding_table.weight
    condition/fc1, fc2, unconditional        cls_embedding.cap_proj.fc1, .fc2, cls_embedding.uncond_embedding
    embed/embedding, norm/scale, head        tok_embeddings.weight, norm.weight, output.weight
    blocks/attn/q k v, o                     layers.i.attention.wqkv (rows q, k, v), wo
    blocks/mlp/gate up down                  layers.i.feed_forward.w1 w3 w2
    blocks/norm1, norm2                      layers.i.attention_norm, ffn_norm

Kernels are (in, out), theirs (out, in). Our rope turns element j of a head with j + H/2, theirs 2j with 2j + 1: rows of q and k are
put in our order.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers.priors.models import shapes
from vlm_jax.visual_tokenizers.priors.options import PUBLISHED, GPTConfig

_PLAIN = {
    "condition/table/embedding": "cls_embedding.embedding_table.weight",
    "condition/unconditional": "cls_embedding.uncond_embedding",
    "condition/fc1/kernel": "cls_embedding.cap_proj.fc1.weight",
    "condition/fc2/kernel": "cls_embedding.cap_proj.fc2.weight",
    "embed/embedding": "tok_embeddings.weight",
    "norm/scale": "norm.weight",
    "head/kernel": "output.weight",
}
_BLOCKS = {
    "attn/o/kernel": "attention.wo.weight",
    "mlp/gate/kernel": "feed_forward.w1.weight",
    "mlp/up/kernel": "feed_forward.w3.weight",
    "mlp/down/kernel": "feed_forward.w2.weight",
    "norm1/scale": "attention_norm.weight",
    "norm2/scale": "ffn_norm.weight",
}
ANCHOR = "tok_embeddings.weight"  # only a prior of LlamaGen has it
_QKV = tuple(f"blocks/attn/{part}/kernel" for part in "qkv")
WRAPPERS = (
    "model",
    "module",
    "state_dict",
    "ema",
)  # keys under which training programs keep the tensors, in LlamaGen's order


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint, its shape there, and which parameters it holds: of block `layer`, or (None) of the whole."""

    key: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    layer: int | None = None


@functools.cache
def entries(config: GPTConfig) -> tuple[Entry, ...]:
    """Every tensor of a checkpoint of `config`."""
    made = shapes(config)
    return tuple(_whole(made)) + tuple(e for layer in range(config.layers) for e in _block(made, layer))


def _whole(made: Mapping[str, Any]) -> Iterator[Entry]:
    for path, key in _PLAIN.items():
        if path in made:
            yield Entry(key, _theirs(path, made[path].shape), (path,))


def _block(made: Mapping[str, Any], layer: int) -> Iterator[Entry]:
    rows = sum(made[path].shape[2] for path in _QKV)
    yield Entry(f"layers.{layer}.attention.wqkv.weight", (rows, made[_QKV[0]].shape[1]), _QKV, layer)
    for path, key in _BLOCKS.items():
        path = f"blocks/{path}"
        yield Entry(f"layers.{layer}.{key}", _theirs(path, made[path].shape[1:]), (path,), layer)


def _theirs(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if path.endswith("kernel") else shape


def _halves(rows: np.ndarray, config: GPTConfig, back: bool) -> np.ndarray:
    """Rows [heads * H, D] of a query or key projection from pairs side by side to two halves, or back."""
    order = (2, config.head_dim // 2) if back else (config.head_dim // 2, 2)
    return rows.reshape(-1, *order, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def read(config: GPTConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our float32 parameters of a checkpoint of `config`; raises ConfigError naming a tensor that is absent or of another shape."""
    made: dict[str, list[np.ndarray]] = {}
    for entry in entries(config):
        if entry.key not in tensors:
            raise ConfigError(f"the checkpoint has no tensor {entry.key}: it is not of this prior's config")
        theirs = np.asarray(tensors[entry.key], np.float32)
        if theirs.shape != entry.shape:
            raise ConfigError(f"{entry.key} has shape {theirs.shape}, but this prior's config needs {entry.shape}")
        if entry.paths == _QKV:
            narrow = config.kv_heads * config.head_dim
            q, k, v = np.split(theirs, [config.width, config.width + narrow])
            parts = [_halves(q, config, False), _halves(k, config, False), v]
        else:
            parts = [theirs]
        for path, part in zip(entry.paths, parts):
            made.setdefault(path, []).append(part.T if path.endswith("kernel") else part)
    return {path: np.stack(parts) if path.startswith("blocks/") else parts[0] for path, parts in made.items()}


def write(config: GPTConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The original checkpoint's tensors of our parameters: inverse of `read`."""
    out = {}
    for entry in entries(config):
        parts = []
        for path in entry.paths:
            ours = np.asarray(params[path] if entry.layer is None else params[path][entry.layer])
            parts.append(ours.T if path.endswith("kernel") else ours)
        if entry.paths == _QKV:
            parts[:2] = (_halves(part, config, True) for part in parts[:2])
        out[entry.key] = np.ascontiguousarray(np.concatenate(parts))
    return out


def unwrapped(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict inside what a LlamaGen program saved, or `found` itself where it is one."""
    return next((found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)), found)


def config_of(found: Mapping[str, tuple[int, ...]], grid: int, heads: int | None = None) -> GPTConfig:
    """The config of a checkpoint from its tensors' shapes; those do not tell `grid`, nor (except of published sizes) `heads`."""
    for key in (ANCHOR, "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight"):
        if key not in found:
            raise ConfigError(f"the checkpoint has no tensor {key}: it is no prior of LlamaGen")
    layers = 1 + max(int(m[1]) for m in (re.match(r"layers\.(\d+)\.", key) for key in found) if m)
    codes, width = found[ANCHOR]
    known = next((c for c in PUBLISHED.values() if (c.layers, c.width) == (layers, width)), None)
    heads = heads or (known.heads if known else None)
    if heads is None:
        raise ConfigError(
            f"a prior of {layers} layers and width {width} is none of the published sizes: say how many heads it has"
        )
    narrow = (found["layers.0.attention.wqkv.weight"][0] - width) // 2
    sizes = dict(layers=layers, heads=heads, kv_heads=narrow * heads // width, width=width, codes=codes, grid=grid)
    sizes["mlp"] = found["layers.0.feed_forward.w1.weight"][0]
    if "cls_embedding.uncond_embedding" in found:
        slots, features = found["cls_embedding.uncond_embedding"]
        return GPTConfig(**sizes, condition="caption", caption_slots=slots, caption_width=features)
    return GPTConfig(**sizes, classes=found["cls_embedding.embedding_table.weight"][0] - 1)
