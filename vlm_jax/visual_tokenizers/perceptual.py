"""LPIPS (Zhang et al. 2018): distance of VGG-16 features of two images [B, H, W, 3] in [-1, 1] -> [B].

    f_k = relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of (x - shift) / scale, each divided by its length over channels + 1e-10
    distance = sum_k mean over space of sum_c w_kc (f_k(a) - f_k(b))_c^2
The dropout in front of w in the original is never applied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers.layers import convolve

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SLICES = (
    (0, 2),
    (5, 7),
    (10, 12, 14),
    (17, 19, 21),
    (24, 26, 28),
)  # convolutions by their number in torchvision's VGG-16


def read_lpips(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"conv_<n>/kernel", "conv_<n>/bias", "lin_<k>"} of `net.slice1.0.weight`, `lin0.model.1.weight` ... or of torchvision's
    `features.0.weight` with `lin0.model.1.weight`; raises ConfigError naming a tensor that is absent.
    """
    found = {}
    for key, value in tensors.items():
        value = np.asarray(value, np.float32)
        conv = re.fullmatch(r"(?:net\.slice\d+|features)\.(\d+)\.(weight|bias)", key)
        lin = re.fullmatch(r"lin(\d)\.model\.1\.weight", key)
        if conv and conv[2] == "weight":
            found[f"conv_{conv[1]}/kernel"] = value.transpose(2, 3, 1, 0)
        elif conv:
            found[f"conv_{conv[1]}/bias"] = value
        elif lin:
            found[f"lin_{lin[1]}"] = value.reshape(-1)
    for k, numbers in enumerate(SLICES):
        for name in (*(f"conv_{n}/{part}" for n in numbers for part in ("kernel", "bias")), f"lin_{k}"):
            if name not in found:
                raise ConfigError(
                    f"the LPIPS weights lack {name}: give a file with VGG-16 and one with the five linear heads"
                )
    return found


def features(params: Mapping[str, jax.Array], images: jax.Array) -> list[jax.Array]:
    """The five feature maps of images in [-1, 1], the k-th at 1 / 2^k of their resolution."""
    x = (images - jnp.asarray(SHIFT, images.dtype)) / jnp.asarray(SCALE, images.dtype)
    out = []
    for k, numbers in enumerate(SLICES):
        if k:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for n in numbers:
            x = jax.nn.relu(convolve(x, params[f"conv_{n}/kernel"], pad=1) + params[f"conv_{n}/bias"].astype(x.dtype))
        out.append(x)
    return out


def lpips(params: Mapping[str, jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    """Distances [B] of images a and b, float32; `params` of `read_lpips`."""
    total = jnp.zeros(len(a), jnp.float32)
    for k, (f, g) in enumerate(zip(features(params, a), features(params, b))):
        gap = (_unit(f.astype(jnp.float32)) - _unit(g.astype(jnp.float32))) ** 2
        total = total + (gap @ params[f"lin_{k}"]).mean((1, 2))
    return total


def _unit(x: jax.Array) -> jax.Array:
    """x / (|x| + 1e-10); where x is 0 the gradient is 0 (the plain square root's is not finite)."""
    square = jnp.sum(x * x, -1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return x / (length + 1e-10)
