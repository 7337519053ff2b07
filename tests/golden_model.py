"""LLaVA goldens as our model: original tensor names -> flat parameters, original batches -> row batches."""

from __future__ import annotations

import json
import re

import numpy as np

from vlm_jax.config import IMAGE, LLMConfig, ProjectorConfig, VisionConfig, VLMConfig
from vlm_jax.models.slots import NEWLINE, slots_of_views

_LLM = "model.layers.{}."
_TOWER = "model.vision_tower.vision_tower.vision_model."


def model_config(info: dict) -> VLMConfig:
    """VLMConfig of a golden's {"llm_config", "mm", "vision_config"}."""
    llm, mm, vision = info["llm_config"], info["mm"], info["vision_config"]
    heads = llm["num_attention_heads"]
    merge = mm.get("mm_patch_merge_type", "flat")
    return VLMConfig(
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
            act=vision["hidden_act"],
            eps=vision["layer_norm_eps"],
            feature_layers=(mm["mm_vision_select_layer"],),
            select={"patch": "patch", "cls_patch": "full"}[mm["mm_vision_select_feature"]],
        ),
        projector=ProjectorConfig(kind=mm["mm_projector_type"]),
        llm=LLMConfig(
            vocab=llm["vocab_size"],
            width=llm["hidden_size"],
            mlp=llm["intermediate_size"],
            layers=llm["num_hidden_layers"],
            heads=heads,
            kv_heads=llm["num_key_value_heads"],
            head_dim=llm["hidden_size"] // heads,
            max_position=llm["max_position_embeddings"],
            eps=llm["rms_norm_eps"],
            tie=llm["tie_word_embeddings"],
        ),
        merge=merge,
        image_newline="unpad" in merge,
        aspect=info.get("image_aspect_ratio", "square"),
        pinpoints=tuple(map(tuple, info.get("image_grid_pinpoints", ()))),
    )


def _tower_name(rest: str) -> tuple[str, int | None]:
    """Name inside CLIPVisionTransformer -> (our path below `tower/`, block or None)."""
    plain = {
        "embeddings.class_embedding": "cls",
        "embeddings.patch_embedding.weight": "patch/kernel",
        "embeddings.position_embedding.weight": "position",
        "pre_layrnorm.weight": "pre_norm/scale",
        "pre_layrnorm.bias": "pre_norm/bias",
        "post_layernorm.weight": "unused/post_norm/scale",
        "post_layernorm.bias": "unused/post_norm/bias",
    }
    if rest in plain:
        return plain[rest], None
    layer, module, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", rest).groups()
    ours = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp/up",
        "mlp.fc2": "mlp/down",
        "self_attn.out_proj": "attn/o",
    }
    ours |= {f"self_attn.{x}_proj": f"attn/{x}" for x in "qkv"}
    leaf = "bias" if kind == "bias" else "scale" if "norm" in module else "kernel"
    return f"blocks/{ours[module]}/{leaf}", int(layer)


def our_name(name: str, config: VLMConfig) -> tuple[str, int | None]:
    """Original LLaVA tensor name -> (our path, layer of the stack or None)."""
    if name.startswith(_TOWER):
        path, layer = _tower_name(name.removeprefix(_TOWER))
        if layer is not None and layer >= config.vision.used_layers:
            return f"tower/unused/{path}", layer - config.vision.used_layers
        return f"tower/{path}", layer
    if match := re.fullmatch(r"model\.mm_projector\.(?:(\d+)\.)?(weight|bias)", name):
        return f"projector/layer_{int(match[1] or 0) // 2}/{'kernel' if match[2] == 'weight' else 'bias'}", None
    fixed = {
        "model.embed_tokens.weight": "llm/embed/embedding",
        "model.norm.weight": "llm/norm/scale",
        "lm_head.weight": "llm/head/kernel",
    }
    fixed["model.image_newline"] = "image_newline"
    if name in fixed:
        return fixed[name], None
    layer, module = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name).groups()
    ours = {"input_layernorm": "norm1/scale", "post_attention_layernorm": "norm2/scale"}
    ours |= {f"self_attn.{x}_proj": f"attn/{x}/kernel" for x in "qkvo"} | {
        f"mlp.{x}_proj": f"mlp/{x}/kernel" for x in ("gate", "up", "down")
    }
    return f"llm/blocks/{ours[module]}", int(layer)


def our_value(path: str, value: np.ndarray) -> np.ndarray:
    """Original tensor -> our layout (kernels are (in, out))."""
    if path.endswith("patch/kernel"):
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.T if path.endswith("kernel") else value


def params_from(weights: dict[str, np.ndarray], config: VLMConfig) -> dict[str, np.ndarray]:
    """{"original name": tensor} -> {"our path": array}, blocks stacked."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    out = {}
    for name, value in weights.items():
        path, layer = our_name(name, config)
        value = our_value(path, np.asarray(value))
        if layer is None:
            out[path] = value
        else:
            stacks.setdefault(path, {})[layer] = value
    return out | {path: np.stack([by[i] for i in range(len(by))]) for path, by in stacks.items()}


def weights_of(npz) -> dict[str, np.ndarray]:
    """The `w:` tensors of a golden file."""
    return {k[2:]: npz[k] for k in npz.files if k.startswith("w:")}


def load(folder, npz=None) -> tuple[VLMConfig, dict[str, np.ndarray]]:
    """(config, params) of a golden case: its own `config_json` and `w:` tensors over those of the folder."""
    info = json.loads((folder / "config.json").read_text())
    weights = weights_of(np.load(folder / "weights.npz"))
    if npz is not None and "config_json" in npz.files:
        info |= json.loads(str(npz["config_json"]))
        weights = {k: v for k, v in weights.items() if k.startswith(_TOWER)}
    if npz is not None:
        weights |= weights_of(npz)
    config = model_config(info)
    return config, params_from(weights, config)


def row_batch(
    config: VLMConfig, ids, keep, labels, views, sizes, *, length: int | None = None, pad_left: bool = False
) -> dict[str, np.ndarray]:
    """Original batch -> one row per sample. `views[r]`: list of view stacks [V, 3, S, S] of row r; `sizes[r]`: their (w, h).

    length: truncation after splicing (tokenizer_model_max_length). Labels follow the papers (unshifted) under "labels".
    """
    P, rows = config.vision.features, []
    budget = max([sum(len(v) for v in row) for row in views] + [1])
    for r in range(len(ids)):
        tokens, slots, row_labels, image, first = [], [], [], 0, 0
        for token, label, kept in zip(ids[r], labels[r], keep[r]):
            if not kept:
                continue
            if token != IMAGE:
                tokens.append(token), slots.append(-1), row_labels.append(label)
                continue
            geometry = slots_of_views(len(views[r][image]), *sizes[r][image], config)
            slots += [budget * P if s == NEWLINE else first * P + s for s in geometry]
            tokens += [0] * len(geometry)
            row_labels += [-100] * len(geometry)
            first, image = first + len(views[r][image]), image + 1
        cut = len(tokens) if length is None else min(length, len(tokens))
        rows.append((tokens[:cut], slots[:cut], row_labels[:cut]))
    T, size = max(len(t) for t, _, _ in rows), config.vision.image_size
    out = {
        k: np.full((len(rows), T), v, np.int32)
        for k, v in (("tokens", 0), ("image_slots", -1), ("labels", -100), ("segments", 0), ("positions", 0))
    }
    out["images"] = np.zeros((len(rows), budget, size, size, 3), np.float32)
    for r, (tokens, slots, row_labels) in enumerate(rows):
        n = len(tokens)
        at = slice(T - n, T) if pad_left else slice(0, n)
        out["tokens"][r, at], out["image_slots"][r, at], out["labels"][r, at] = tokens, slots, row_labels
        out["segments"][r, at], out["positions"][r, at] = 1, np.arange(n)
        if views[r]:
            stacked = np.concatenate(views[r])
            out["images"][r, : len(stacked)] = stacked.transpose(0, 2, 3, 1)
    shifted = np.concatenate([out["labels"][:, 1:], np.full((len(rows), 1), -100, np.int32)], 1)
    out["targets"], out["weights"] = np.where(shifted == -100, 0, shifted), (shifted != -100).astype(np.float32)
    return out


def assign_images(ids, keep, images) -> tuple[list, list]:
    """Images consumed in order, a row without image consuming one dummy: (views per row, sizes per row)."""
    views, sizes, used = [], [], 0
    for row, kept in zip(ids, keep):
        count = int(((row == IMAGE) & kept).sum())
        stacks = [np.asarray(images[used + i]) for i in range(count)]
        views.append([v if v.ndim == 4 else v[None] for v in stacks])
        sizes.append([(v.shape[-1], v.shape[-2]) for v in views[-1]])
        used += max(count, 1)
    return views, sizes
