"""Kernels in 4 or 8 bits, exactly as bitsandbytes defines them: NF4 with double quantisation (Dettmers et al. 2023), int8.

    a kernel W [in, out] becomes              shape               dtype      meaning
    nf4   kernel_codes                        [in / 2, out]       uint8      inputs 2i (high nibble) and 2i + 1 (low)
          kernel_absmax                       [in / block, out]   float32    largest |w| of `block` inputs of one output
      double: the same, minus its mean        [in / block, out]   uint8      codes of the dynamic map
              kernel_absmax_scale             [n / 256]           float32    n = in / block * out, outputs first as in torch
              kernel_absmax_mean              []                  float32
    int8  kernel_int8                         [in, out]           int8       round(127 w / absmax of the output)
          kernel_scale                        [out]               float32    absmax / 127

Rates per weight: nf4 4.5 bits, double 4.127, int8 8. `quantise` runs in numpy (loading) and in jax (random weights); one layer at a
time, so that a stacked kernel never exists in more bits. qwix, which does the like, cannot attach adapters to scanned stacks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import ConfigError, QuantConfig

# quantiles of N(0, 1) scaled to [-1, 1], with an exact 0 (appendix E of the QLoRA paper)
NF4 = np.asarray(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
NESTED = 256  # absmax values that share a scale
NAMES = ("kernel_codes", "kernel_absmax", "kernel_absmax_scale", "kernel_absmax_mean", "kernel_int8", "kernel_scale")
KERNEL = "kernel"  # the leaf that they stand for

Leaves = dict[str, Any]


class Like(NamedTuple):
    """Shape, dtype and logical axes of a leaf."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]


def is_quantised(path: str) -> bool:
    """Whether the parameter at `path` is part of a quantised kernel."""
    return path.rpartition("/")[2] in NAMES


def check(path: str, inputs: int, quant: QuantConfig) -> None:
    """Raise ConfigError if the linear at `path` cannot be cut into blocks."""
    if quant.kind == "nf4" and inputs % quant.block:
        raise ConfigError(
            f"model.quant.block={quant.block} does not divide the {inputs} inputs of {path}: "
            "choose a block that does, or take this linear out of model.quant.targets"
        )


def layout(shape: tuple[int, int], axes: tuple[str | None, ...], quant: QuantConfig) -> dict[str, Like]:
    """The leaves of a kernel of `shape` (in, out) with logical `axes`."""
    (inputs, outputs), blocks = shape, shape[0] // quant.block
    if quant.kind == "int8":
        return {
            "kernel_int8": Like(shape, np.int8, axes),
            "kernel_scale": Like((outputs,), np.float32, axes[1:]),
        }
    out = {
        "kernel_codes": Like((inputs // 2, outputs), np.uint8, axes),
        "kernel_absmax": Like((blocks, outputs), np.uint8 if quant.double else np.float32, axes),
    }
    if quant.double:
        out["kernel_absmax_scale"] = Like((-(-blocks * outputs // NESTED),), np.float32, (None,))
        out["kernel_absmax_mean"] = Like((), np.float32, ())
    return out


def quantise(kernel: Any, quant: QuantConfig, xp: ModuleType = np) -> Leaves:
    """kernel [in, out] of any float type -> its leaves; xp: numpy or jax.numpy."""
    w = kernel.astype(np.float32)
    if quant.kind == "int8":
        absmax = xp.max(xp.abs(w), axis=0)
        return {
            "kernel_int8": xp.round(w * (127.0 * _inverse(absmax, xp))).astype(np.int8),
            "kernel_scale": absmax / 127,
        }
    inputs, outputs = w.shape
    blocks = w.reshape(inputs // quant.block, quant.block, outputs)
    absmax = xp.max(xp.abs(blocks), axis=1)
    codes = _nearest(NF4, (blocks * _inverse(absmax, xp)[:, None]).reshape(inputs, outputs), xp)
    leaves = {"kernel_codes": codes[0::2] << 4 | codes[1::2]}
    return leaves | (_quantise_absmax(absmax, xp) if quant.double else {"kernel_absmax": absmax})


def dequantise(leaves: Mapping[str, Any], quant: QuantConfig, dtype: Any, xp: ModuleType = jnp) -> Any:
    """The kernel [in, out] in `dtype`, computed in float32; inverse of `quantise` up to its rounding."""
    if quant.kind == "int8":
        return (leaves["kernel_int8"].astype(np.float32) * leaves["kernel_scale"]).astype(dtype)
    codes = leaves["kernel_codes"]
    absmax = _dequantise_absmax(leaves, xp) if quant.double else leaves["kernel_absmax"]
    pairs = xp.stack([codes >> 4, codes & 15], axis=1)
    values = NF4[pairs] if xp is np else _select(pairs)
    return (values.reshape(len(absmax), quant.block, -1) * absmax[:, None]).reshape(-1, codes.shape[1]).astype(dtype)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the signed dynamic 8-bit type, sorted (Dettmers 2016; bitsandbytes' create_dynamic_map).

    0, 1, and for the exponents 10^-6 .. 10^0 the middles of 1, 2, 4 .. 64 equal parts of [0.1, 1], both signs.
    """
    positive = []
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        positive.append(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    values = np.concatenate(positive)
    return np.sort(np.concatenate([-values, [0.0, 1.0], values])).astype(np.float32)


def _quantise_absmax(absmax: Any, xp: ModuleType) -> Leaves:
    """absmax [blocks, out] as 8-bit codes around its mean."""
    blocks, outputs = absmax.shape
    mean = xp.mean(absmax, dtype=np.float32)
    flat = (absmax - mean).T.reshape(-1)  # in the order of the torch weight, [out, in]
    groups = xp.pad(flat, (0, -flat.size % NESTED)).reshape(-1, NESTED)
    scale = xp.max(xp.abs(groups), axis=1)
    codes = _nearest(dynamic_map(), groups * _inverse(scale, xp)[:, None], xp).reshape(-1)[: flat.size]
    codes = codes.reshape(outputs, blocks).T
    return {"kernel_absmax": codes, "kernel_absmax_scale": scale, "kernel_absmax_mean": mean}


def _dequantise_absmax(leaves: Mapping[str, Any], xp: ModuleType) -> Any:
    codes = leaves["kernel_absmax"]
    blocks, outputs = codes.shape
    scale = xp.repeat(leaves["kernel_absmax_scale"], NESTED)[: codes.size].reshape(outputs, blocks).T
    return xp.asarray(dynamic_map())[codes] * scale + leaves["kernel_absmax_mean"]


def _inverse(x: Any, xp: ModuleType) -> Any:
    """1 / x, 0 where x is 0: a block of zeros stays one."""
    return xp.where(x > 0, 1 / xp.where(x > 0, x, 1), 0).astype(np.float32)


def _nearest(table: np.ndarray, x: Any, xp: ModuleType) -> Any:
    """Index into the sorted `table` of the value nearest to x, uint8."""
    middles = (table[:-1] + table[1:]) / 2
    if len(table) > 16:
        return xp.searchsorted(middles, x).astype(np.uint8)
    codes = (x > middles[0]).astype(np.uint8)  # a chain of comparisons: five times as fast as a search in numpy
    for middle in middles[1:]:
        codes += x > middle
    return codes


def _select(codes: jax.Array) -> jax.Array:
    """NF4[codes] as a tree of 15 selections, which fuses into the product's operand; a gather does not, and is slow on TPUs."""
    values: list[Any] = [jnp.float32(v) for v in NF4]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]
