"""Discriminators: images [B, H, W, 3] -> logits. Batch norm's running statistics are explicit state.

    patch  conv 4x4 stride 2, then widths doubling with a norm and leaky ReLU 0.2, a map of logits     Isola et al. 2017
    style  residual blocks with a blur before each stride, one logit per image                         Karras et al. 2020
Batch statistics are those of the whole batch: under a mesh, jit makes them the statistics over all devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm_jax.config import at_least_one, one_of
from vlm_jax.nn.layers import Linear
from vlm_jax.nn.params import normal, ones, param, zeros
from vlm_jax.visual_tokenizers.group_norm import GroupNorm
from vlm_jax.visual_tokenizers.layers import Conv

NORMS = ("batch", "group", "act")
Stats = dict[str, jax.Array]
SLOPE = 0.2


class BatchNorm(nnx.Module):
    """Batch norm with eps 1e-5; running mean and unbiased variance move by a tenth."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        scale = lambda key, shape, dtype: 1 + normal(0.02)(key, shape, dtype)
        self.scale, self.bias = param(rngs, scale, (width,), (None,)), param(rngs, zeros, (width,), (None,))

    def __call__(self, x: jax.Array, mean: jax.Array, var: jax.Array, train: bool):
        """(y, running mean, running variance); in training y is normalised by the batch's own statistics."""
        f = x.astype(jnp.float32)
        here, spread = mean, var
        if train:
            here, spread = f.mean((0, 1, 2)), f.var((0, 1, 2))
            n = math.prod(x.shape[:3])
            mean = 0.9 * mean + 0.1 * jax.lax.stop_gradient(here)
            var = 0.9 * var + 0.1 * jax.lax.stop_gradient(spread) * n / max(n - 1, 1)
        y = (f - here) * jax.lax.rsqrt(spread + 1e-5) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype), mean, var


class ActNorm(nnx.Module):
    """scale (x + shift), both learned; `calibrate` makes the outputs of one batch have mean 0 and deviation 1."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.scale, self.shift = param(rngs, ones, (width,), (None,)), param(rngs, zeros, (width,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale[...].astype(x.dtype) * (x + self.shift[...].astype(x.dtype))

    def calibrate(self, x: jax.Array) -> None:
        """Set scale and shift from x [B, H, W, C] (unbiased deviation)."""
        self.shift.set_value(-x.mean((0, 1, 2)))
        self.scale.set_value(1 / (x.std((0, 1, 2), ddof=1) + 1e-6))


class PatchCritic(nnx.Module):
    """PatchGAN; attributes are named after the layers' numbers in the original, main_0 ... (norms included)."""

    def __init__(self, rngs: nnx.Rngs, *, width: int = 64, layers: int = 3, norm: str = "batch"):
        one_of("critic.norm", norm, NORMS)
        self.norm, self.layers = norm, layers
        at_least_one("critic", self, ("layers",))
        make = {"batch": BatchNorm, "group": GroupNorm, "act": ActNorm}[norm]
        start = normal(0.02)  # as DCGAN, all kernels
        self.main_0 = Conv(3, width, 4, rngs, stride=2, pad=1, init=start)
        din = width
        for n in range(1, layers + 1):
            dout, at = width * min(2**n, 8), 3 * n - 1
            conv = Conv(din, dout, 4, rngs, stride=2 if n < layers else 1, pad=1, bias=norm == "act", init=start)
            setattr(self, f"main_{at}", conv)
            setattr(self, f"main_{at + 1}", make(dout, rngs))
            din = dout
        setattr(self, f"main_{3 * layers + 2}", Conv(din, 1, 4, rngs, pad=1, init=start))

    def initial(self) -> Stats:
        """Running statistics before training; empty without batch norm."""
        if self.norm != "batch":
            return {}
        norms = {f"main_{3 * n}": getattr(self, f"main_{3 * n}") for n in range(1, self.layers + 1)}
        return {
            f"{name}/{part}": jnp.full(norm.scale[...].shape, value)
            for name, norm in norms.items()
            for part, value in (("mean", 0.0), ("var", 1.0))
        }

    def __call__(self, x: jax.Array, stats: Mapping[str, jax.Array], train: bool = False) -> tuple[jax.Array, Stats]:
        """(logits [B, h, w, 1], statistics after)."""
        stats = dict(stats)
        x = jax.nn.leaky_relu(self.main_0(x), SLOPE)
        for n in range(1, self.layers + 1):
            name = f"main_{3 * n}"
            x, norm = getattr(self, f"main_{3 * n - 1}")(x), getattr(self, name)
            if self.norm == "batch":
                mean, var = f"{name}/mean", f"{name}/var"
                x, stats[mean], stats[var] = norm(x, stats[mean], stats[var], train)
            else:
                x = norm(x)
            x = jax.nn.leaky_relu(x, SLOPE)
        return getattr(self, f"main_{3 * self.layers + 2}")(x), stats

    def calibrate(self, x: jax.Array) -> None:
        """Give every ActNorm the statistics of its input for the images x, layer after layer."""
        x = jax.nn.leaky_relu(self.main_0(x), SLOPE)
        for n in range(1, self.layers + 1):
            x, norm = getattr(self, f"main_{3 * n - 1}")(x), getattr(self, f"main_{3 * n}")
            norm.calibrate(x)
            x = jax.nn.leaky_relu(norm(x), SLOPE)


def read_patch_critic(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(parameters, running statistics) of the tensors `main.0.weight` ... of an original discriminator."""
    params, stats = {}, {}
    for key, value in tensors.items():
        layer, name = key.removeprefix("main.").split(".")
        where, value = f"main_{layer}", np.asarray(value, np.float32)
        if name in ("running_mean", "running_var"):
            stats[f"{where}/{name.removeprefix('running_')}"] = value
        elif name in ("loc", "scale"):
            params[f"{where}/{'shift' if name == 'loc' else 'scale'}"] = value.reshape(-1)
        elif name == "weight" and value.ndim == 4:
            params[f"{where}/kernel"] = value.transpose(2, 3, 1, 0)
        elif name in ("weight", "bias"):
            params[f"{where}/{'scale' if name == 'weight' else 'bias'}"] = value
    return params, stats


class StyleBlock(nnx.Module):
    """Half the resolution: (1x1 stride 2 + (3x3, 3x3, blur, 3x3 stride 2)) / sqrt 2."""

    def __init__(self, din: int, dout: int, rngs: nnx.Rngs):
        self.skip = Conv(din, dout, 1, rngs, stride=2)
        self.conv1, self.conv2 = Conv(din, dout, 3, rngs, pad=1), Conv(dout, dout, 3, rngs, pad=1)
        self.down = Conv(dout, dout, 3, rngs, stride=2, pad=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.leaky_relu(self.conv1(x), SLOPE)
        h = self.down(_blur(jax.nn.leaky_relu(self.conv2(h), SLOPE)))
        return (h + self.skip(x)) / math.sqrt(2)


def _blur(x: jax.Array) -> jax.Array:
    """[1 2 1] x [1 2 1] / 16 with reflected edges."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        wide, n = jnp.pad(x, pad, mode="reflect"), x.shape[axis]
        x = sum(w * jax.lax.slice_in_dim(wide, i, i + n, axis=axis) for i, w in enumerate((0.25, 0.5, 0.25)))
    return x


class StyleCritic(nnx.Module):
    """StyleGAN's discriminator for images of `size` pixels, a power of two from 8 on: [B, size, size, 3] -> [B, 1]."""

    def __init__(self, rngs: nnx.Rngs, *, size: int = 256):
        width = {256: 64, 128: 128, 64: 256}
        din = width.get(size, 512 if size < 256 else 32)
        self.first, self.blocks = Conv(3, din, 3, rngs, pad=1), int(math.log2(size)) - 2
        for i in range(self.blocks):
            size //= 2
            dout = width.get(size, 512)
            setattr(self, f"block_{i}", StyleBlock(din, dout, rngs))
            din = dout
        self.last = Conv(din, din, 3, rngs, pad=1)
        self.hidden = Linear(din * 16, din, ("embed", None), rngs, bias=True)
        self.out = Linear(din, 1, ("embed", None), rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.leaky_relu(self.first(x), SLOPE)
        for i in range(self.blocks):
            x = getattr(self, f"block_{i}")(x)
        x = jax.nn.leaky_relu(self.last(x), SLOPE)
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channels first, as the original flattens
        return self.out(jax.nn.leaky_relu(self.hidden(x), SLOPE))


def read_style_critic(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters of the tensors `blocks.0.weight` ... of an original StyleGAN discriminator; its constant blur filters are left out."""
    parts = {"conv_res": "skip", "net.0": "conv1", "net.2": "conv2", "downsample.1": "down"}
    ends = {"blocks.0": "first", "final_conv.0": "last", "final_linear.0": "hidden", "final_linear.2": "out"}
    params = {}
    for key, value in tensors.items():
        where, _, name = key.rpartition(".")
        if name == "f":
            continue
        if where in ends:
            ours = ends[where]
        else:
            _, block, part = where.split(".", 2)
            ours = f"block_{int(block) - 2}/{parts[part]}"
        value = np.asarray(value, np.float32)
        turned = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        params[f"{ours}/{'kernel' if name == 'weight' else 'bias'}"] = turned
    return params
