"""CLIP-FlanT5 goldens as our model: original tensor names -> flat parameters, original batches -> row batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.goldens import cases
from vlm_jax.config import IGNORE, IMAGE, VLMConfig
from vlm_jax.convert import names
from vlm_jax.convert.llava_config import vlm_from_llava
from vlm_jax.convert.tensors import Leaf, Tensor
from vlm_jax.data.packing import Piece, RowShape, build_row, expand
from vlm_jax.data.tasks import Sample

FOLDER = "clip_flant5"


def models() -> dict[str, Path]:
    """{name: its weights}: every NAME_weights.npz that has a NAME_config.json."""
    found = {path.name.removesuffix("_weights.npz"): path for path in cases(FOLDER, "*_weights.npz")}
    return {name: path for name, path in found.items() if path.with_name(f"{name}_config.json").exists()}


def files_with(*keys: str) -> list[tuple[str, Path]]:
    """(model, file) of every npz of a model that holds all `keys`."""
    found = []
    for name in models():
        for path in cases(FOLDER, f"{name}_*.npz"):
            if set(keys) <= set(np.load(path).files):
                found.append((name, path))
    return found


def load(name: str) -> tuple[VLMConfig, dict[str, np.ndarray]]:
    """(config, params) of a model."""
    path = models()[name]
    info = json.loads(path.with_name(f"{name}_config.json").read_text())
    vision = {"model_type": "clip_vision_model", **info["vision"]}
    raw = {**info["t5"], **info["mm"], "model_type": "clip_t5", "vision_config": vision}
    config, z = vlm_from_llava(raw, str(path)), np.load(path)
    return config, params_of(config, {key[2:]: z[key] for key in z.files if key.startswith("w/")})


def params_of(config: VLMConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"original name": tensor} -> {"our path": array}, blocks stacked; only parameters whose tensors are all there."""
    parts: dict[str, list[Tensor | None]] = {}
    entries = {}
    for entry in names.entries(config):
        key = names.key_of(entry, "clip_t5", config.projector.kind)
        value = tensors.get(key)
        parts.setdefault(entry.path, []).append(None if value is None else tensor_of(key, value))
        entries[entry.path] = entry
    return {
        path: Leaf(path, tuple(members), entries[path].layout, entries[path].layer is not None).read()
        for path, members in parts.items()
        if None not in members
    }


def tensor_of(name: str, value: np.ndarray) -> Tensor:
    return Tensor(name, value.shape, value.dtype, "", lambda index: value[index])


def samples_of(z) -> tuple[list[Sample], list[np.ndarray]]:
    """(samples, images of each [n, S, S, 3]); a row without a marker uses up one image all the same."""
    samples, images, used = [], [], 0
    for ids, kept, labels in zip(z["in/input_ids"], z["in/attention_mask"], z["in/labels"]):
        tokens = ids[kept == 1].astype(np.int64)
        count = int((tokens == IMAGE).sum())
        samples.append(
            Sample(tokens, np.full_like(tokens, IGNORE), ("image",) * count, answer=labels[labels != IGNORE])
        )
        images.append(z["in/images"][used : used + count].transpose(0, 2, 3, 1))
        used += max(count, 1)
    return samples, images


def row_batch(config: VLMConfig, z, together: bool = False) -> dict[str, np.ndarray]:
    """The batch as rows of one sample each, or as one row that holds all."""
    samples, images = samples_of(z)
    features, size = config.vision.features, config.vision.image_size
    pieces = []
    for sample, pixels in zip(samples, images):
        n = len(pixels)
        slots = expand(sample, [np.arange(features, dtype=np.int32)] * n, [1] * n, features)
        pieces.append(Piece(len(slots), n, slots, pixels, len(sample.answer)))
    groups = [pieces] if together else [[piece] for piece in pieces]

    def most(count) -> int:
        return max(sum(map(count, group)) for group in groups)

    shape = RowShape(
        most(lambda p: p.length),
        max(most(lambda p: p.views), 1),
        size,
        features,
        most(lambda p: p.answers),
        dtype=np.float32,
    )
    rows = [build_row(group, shape) for group in groups]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
