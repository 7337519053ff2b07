"""Goldens of visual tokenizers: configs, weights made by formula from tensor names, and channels-first arrays as ours."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.goldens import beside
from vlm_jax.nn.params import merge, split
from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.options import AutoencoderConfig, QuantizerConfig, TokenizerConfig
from vlm_jax.visual_tokenizers.tokenizer import VisualTokenizer


def formula(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 tensor that the goldens' README derives from a name (rules tried in its order)."""
    x = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()) & 0xFFFFFFFF).standard_normal(size=shape)
    parts = name.split(".")
    if len(shape) >= 3:
        x = x / np.sqrt(np.prod(shape[1:]))
    elif parts[-1] in ("bias", "running_mean"):
        x = 0.1 * x
    elif any("embedding" in part for part in parts[-2:]):
        pass
    elif len(shape) == 2:
        x = x / np.sqrt(shape[1])
    elif parts[-1] == "weight":
        x = 1 + 0.1 * x
    elif parts[-1] == "running_var":
        x = 1 + 0.1 * np.abs(x)
    else:
        x = 0.1 * x
    return np.asarray(x, np.float32)


def load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, config) of an npz golden."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("config_json"))) if "config_json" in arrays else {}


def weights(arrays: dict[str, np.ndarray], prefix: str = "w/") -> dict[str, np.ndarray]:
    """The tensors that a golden stores, under their original names."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def last(x: np.ndarray) -> jax.Array:
    """Channels first -> channels last, float32."""
    return jnp.asarray(np.moveaxis(np.asarray(x, np.float32), 1, -1))


def first(x: jax.Array) -> np.ndarray:
    """Channels last -> channels first."""
    return np.moveaxis(np.asarray(x), -1, 1)


def tokenizer(config: TokenizerConfig, tensors: dict[str, np.ndarray]):
    """(graph, parameters, codebooks) of a tokenizer with the tensors of a checkpoint."""
    graph, made = split(nnx.eval_shape(lambda: VisualTokenizer(config, nnx.Rngs(0))))
    params, books = names.read(config, tensors)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in made.items()}
    return graph, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, books)


def run(graph, params, function):
    """function(model) of a tokenizer put together from its parts."""
    return function(merge(graph, params))


def vq_config(info: dict) -> TokenizerConfig:
    """TokenizerConfig of a LlamaGen golden."""
    if "model" in info:
        multipliers = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}[info["model"]]
        info = {"ch": 128, "ch_mult": multipliers, "num_res_blocks": 2, "z_channels": 256, **info}
    levels = len(info["ch_mult"])
    return TokenizerConfig(
        AutoencoderConfig(
            width=info["ch"],
            multipliers=tuple(info["ch_mult"]),
            blocks=info["num_res_blocks"],
            attention=(256 >> levels - 1,),
            latent=info["z_channels"],
        ),
        QuantizerConfig(
            codes=(info["codebook_size"],),
            width=info["codebook_embed_dim"],
            normalise=info.get("l2_norm", True),
            beta=info.get("commit_loss_beta", 0.25),
            entropy=info.get("entropy_loss_ratio", 0.0),
            tile=100,
        ),
    )


def autoencoder_config(h: dict) -> AutoencoderConfig:
    """AutoencoderConfig of the `hparams` or `ddconfig` of an RQ-VAE, HQ-VAE or UniCode golden."""
    return AutoencoderConfig(
        width=h["ch"],
        multipliers=tuple(h["ch_mult"]),
        blocks=h["num_res_blocks"],
        attention=tuple(h["attn_resolutions"]),
        resolution=h["resolution"],
        latent=h["z_channels"],
        init_downsample=h.get("use_init_downsample", False),
    )


def rq_quantizer(info: dict) -> QuantizerConfig:
    """QuantizerConfig of an RQ-VAE golden."""
    return QuantizerConfig(
        kind="rq",
        codes=(info["n_embed"],),
        width=info["embed_dim"],
        depth=info["code_shape"][-1],
        decay=info["decay"],
        eps=info["eps"],
        beta=info["latent_loss_weight"],
        shared=info["shared_codebook"],
        restart=info["restart_unused_codes"],
        tile=20,
    )


def hq_quantizer(info: dict) -> QuantizerConfig:
    """QuantizerConfig of an HQ-VAE golden."""
    aux, upsample = info["hparams_aux"], info["hparams_aux"]["upsample"]
    kind, codes = (
        ("levels", tuple(info["n_embed_levels"])) if "n_embed_levels" in info else ("two_level", (info["n_embed"],))
    )
    digits = upsample.lstrip("abcdefghijklmnopqrstuvwxyz")
    return QuantizerConfig(
        kind=kind,
        codes=codes,
        width=info["embed_dim"],
        upsample=upsample.removesuffix(digits),
        factor=int(digits or 2),
        shared=bool(aux["shared_codebook"]),
        tile=20,
    )


def case(path: Path, shared_weights: str):
    """(arrays, info, tensors, AutoencoderConfig) of a golden whose autoencoder's weights several goldens share."""
    arrays, info = load(path)
    encdec, hparams = load(beside(path, shared_weights))
    return arrays, info, weights(encdec) | weights(arrays), autoencoder_config(hparams)
