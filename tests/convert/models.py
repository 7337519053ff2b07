"""Small random models and their directories, for the tests of this folder."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from vlm_jax.config import LLMConfig, ProjectorConfig, RopeConfig, VisionConfig, VLMConfig
from vlm_jax.convert import names
from vlm_jax.convert.files import write_json
from vlm_jax.convert.hf_config import llm_to_hf, vision_to_hf
from vlm_jax.convert.shards import Planned, write_directory

CLIP = VisionConfig(image_size=28, patch_size=7, width=24, layers=3, heads=3, mlp=48)
SIGLIP = VisionConfig(
    "siglip",
    28,
    7,
    24,
    3,
    3,
    48,
    "gelu_tanh",
    1e-6,
    (-1,),
    "full",
    pooler_head=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
LLAMA = LLMConfig(vocab=104, width=32, mlp=72, layers=2, heads=4, kv_heads=2, head_dim=8, max_position=64)
TINY = VLMConfig(CLIP, ProjectorConfig(), LLAMA, aspect="square")


def with_llm(**changes) -> VLMConfig:
    return dataclasses.replace(TINY, llm=dataclasses.replace(LLAMA, **changes))


def with_rope(**changes) -> VLMConfig:
    return with_llm(rope=RopeConfig(**changes))


VARIANTS = {
    "plain": TINY,
    "siglip_pad": dataclasses.replace(TINY, vision=SIGLIP, aspect="pad"),
    "full_two_layers": dataclasses.replace(
        TINY, vision=dataclasses.replace(CLIP, feature_layers=(0, -1), select="full", act="gelu")
    ),
    "mistral_window": with_llm(window=7, head_dim=12),
    "tied_biased": with_llm(tie=True, attention_bias=True, mlp_bias=True, act="relu"),
    "linear": with_rope(kind="linear", factor=3.0, theta=5e4),
    "dynamic": with_rope(kind="dynamic", factor=2.0),
    "yarn": with_rope(kind="yarn", factor=4.0, original_max_position=16),
    "yarn_factor": with_rope(
        kind="yarn", factor=2.0, original_max_position=32, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0
    ),
    "llama3": with_rope(
        kind="llama3",
        factor=8.0,
        original_max_position=16,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        theta=5e5,
    ),
    "no_projector_bias": dataclasses.replace(TINY, projector=ProjectorConfig("mlp2x_gelu", "gelu_tanh", bias=False)),
}


def random_params(config: VLMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Flat parameters, float32, of a size that keeps attention away from uniform."""
    rng = np.random.default_rng(seed)
    stacks: dict[str, list] = {}
    for entry in names.entries(config):
        scale = (
            1 + 0.1 * rng.normal(size=entry.shape)
            if entry.path.endswith("scale")
            else 0.2 * rng.normal(size=entry.shape)
        )
        stacks.setdefault(entry.path, []).append(
            (entry.layer, scale.astype(np.float32).reshape(entry.layout.shape(entry.shape)))
        )
    return {
        path: parts[0][1] if parts[0][0] is None else np.stack([p for _, p in parts]) for path, parts in stacks.items()
    }


def random_tensors(
    config: VLMConfig, rooms: tuple[str, ...], prefixes: dict[str, str], seed: int = 0
) -> dict[str, np.ndarray]:
    """{prefix of its room + key: tensor} in the checkpoint's layout."""
    rng = np.random.default_rng(seed)
    return {
        prefixes.get(entry.room, "") + entry.key: rng.normal(size=entry.shape).astype(np.float32)
        for entry in names.entries(config, rooms)
    }


def write_tensors(directory: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    """A model directory with one safetensors file."""
    directory.mkdir(parents=True)
    write_directory(directory, [Planned(k, v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()])
    write_json(directory / "config.json", config)
    return directory


def llm_directory(directory: Path, config: VLMConfig = TINY, seed: int = 0) -> Path:
    """A Llama or Mistral on its own."""
    tensors = random_tensors(config, ("llm", "head"), {"llm": "model.", "head": "lm_head."}, seed)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    return write_tensors(directory, tensors, llm_to_hf(config.llm) | {"bos_token_id": 1, "eos_token_id": 2})


def tower_directory(directory: Path, config: VLMConfig = TINY, seed: int = 1, prefix: str = "vision_model.") -> Path:
    """A CLIP or SigLIP tower on its own, as a full CLIP checkpoint holds it."""
    tensors = random_tensors(config, ("tower",), {"tower": prefix}, seed)
    tensors["logit_scale"] = np.zeros((), np.float32)
    tensors["text_model.embeddings.token_embedding.weight"] = np.zeros((3, 2), np.float32)
    tensors["vision_model.embeddings.position_ids"] = np.arange(config.vision.tokens)
    return write_tensors(directory, tensors, vision_to_hf(config.vision))


def linears(config: VLMConfig) -> dict[str, tuple[int, ...]]:
    """{path of a linear: shape of its kernel, stacked} that an adapter may be put on."""
    found: dict[str, list[tuple[int, int]]] = {}
    stacked = set()
    for entry in names.entries(config):
        if entry.path.endswith("/kernel") and entry.key.endswith(".weight") and len(entry.shape) == 2:
            path = entry.path.removesuffix("/kernel")
            found.setdefault(path, []).append(entry.shape[::-1])
            stacked |= {path} if entry.layer is not None else set()
    return {path: (len(s), *s[0]) if path in stacked else s[0] for path, s in found.items()}


def random_adapter(config: VLMConfig, seed: int = 5) -> dict[str, np.ndarray]:
    """lora_a, lora_b and lora_scale of the groups `config.lora`, none of them zero."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, (*layers, din, dout) in linears(config).items():
        group = next((g for g in config.lora if any(re.search(t, path) for t in g.targets)), None)
        if group is not None:
            leaves[f"{path}/lora_a"] = rng.normal(size=(*layers, din, group.rank)).astype(np.float32)
            leaves[f"{path}/lora_b"] = 0.1 * rng.normal(size=(*layers, group.rank, dout)).astype(np.float32)
            leaves[f"{path}/lora_scale"] = np.full((*layers, group.rank), group.scale, np.float32)
    return leaves
