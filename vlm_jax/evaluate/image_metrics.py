"""How close two sets of uint8 images [B, H, W, 3] are, image by image, and how much of a codebook is in use.

    mse    mean over pixels and channels of (a - b)^2, both in [0, 1]                     psnr   10 log10(1 / mse), dB
    ssim   mean over places and channels, windows of 7 x 7 with equal weights that lie inside the image (Wang et al. 2004):
               (2 ua ub + C1) (2 cab + C2) / ((ua^2 + ub^2 + C1) (va + vb + C2)),   C1 = (.01 R)^2, C2 = (.03 R)^2, R = 255
           variances divided by 48; what scikit-image computes, and LlamaGen reports (with R twice too large: SSIM_RANGE_2)
    lpips  visual_tokenizers.perceptual
    usage  share of a codebook's entries that occur; perplexity: exp of the entropy of how often each occurs

Sums of pixels in a window are integers below 2^31, so that variances lose nothing to rounding although all is done in 32 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import UserError
from vlm_jax.visual_tokenizers import perceptual
from vlm_jax.visual_tokenizers.codebook import perplexity
from vlm_jax.visual_tokenizers.options import QuantizerConfig

WINDOW = 7
SSIM_RANGE_2 = 510.0  # LlamaGen's evaluation: a data range of 2 for images in [0, 1]


def same_size(a: Sequence[int], b: Sequence[int], what: str) -> None:
    """Raise UserError unless two images (or their shapes' heads) are of one size, and large enough for an SSIM window."""
    if tuple(a) != tuple(b):
        raise UserError(f"{what}: {a[1]} x {a[0]} and {b[1]} x {b[0]} pixels cannot be compared, resize one of them")
    if min(a[:2]) < WINDOW:
        raise UserError(f"{what}: {a[1]} x {a[0]} pixels is too small, SSIM needs {WINDOW} x {WINDOW}")


@jax.jit
def mse(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared error [B], float32, of uint8 images as if in [0, 1]."""
    gap = a.astype(jnp.float32) - b.astype(jnp.float32)
    return (gap * gap).mean((2, 3)).mean(1) / 255**2  # row by row: a sum over all pixels would exceed 24 bits


def psnr(mse: np.ndarray) -> np.ndarray:
    """dB of mean squared errors in [0, 1]; infinite where an error is 0."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.asarray(mse, np.float64))


@jax.jit
def ssim(a: jax.Array, b: jax.Array, data_range: float = 255.0) -> jax.Array:
    """Structural similarity [B], float32, of uint8 images; see the module."""
    a, b = a.astype(jnp.int32), b.astype(jnp.int32)
    n = WINDOW * WINDOW
    sa, sb = _window_sums(a), _window_sums(b)
    va, vb, cab = (
        (n * _window_sums(x * y) - sx * sy).astype(jnp.float32) / (n * (n - 1))
        for x, y, sx, sy in ((a, a, sa, sa), (b, b, sb, sb), (a, b, sa, sb))
    )
    ua, ub = sa.astype(jnp.float32) / n, sb.astype(jnp.float32) / n
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = (2 * ua * ub + c1) * (2 * cab + c2) / ((ua * ua + ub * ub + c1) * (va + vb + c2))
    return values.mean((2, 3)).mean(1)


def _window_sums(x: jax.Array) -> jax.Array:
    """Sums of int32 [B, H, W, C] over WINDOW x WINDOW places: [B, H - 6, W - 6, C]."""
    for window in ((1, WINDOW, 1, 1), (1, 1, WINDOW, 1)):
        x = jax.lax.reduce_window(x, jnp.int32(0), jax.lax.add, window, (1, 1, 1, 1), "VALID")
    return x


@jax.jit
def lpips(params: Mapping[str, jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    """LPIPS [B] of uint8 images; params of `perceptual.read_lpips`."""
    with jax.default_matmul_precision("highest"):
        return perceptual.lpips(params, *(x.astype(jnp.float32) / 127.5 - 1 for x in (a, b)))


class CodeCounts:
    """How often every code of every codebook has occurred."""

    def __init__(self, config: QuantizerConfig):
        self.config = config
        self.counts: dict[str, np.ndarray] = {}

    def add(self, codes: Sequence[np.ndarray]) -> None:
        """Count codes as a tokenizer's `encode` gives them: one int array per level, coarsest first."""
        parts = self._parts([np.asarray(level) for level in codes])
        found = {name: np.bincount(level.reshape(-1), minlength=size) for name, (level, size) in parts.items()}
        if self.config.shared and len(found) > 1:
            found["table"] = functools.reduce(np.add, found.values())
        for name, counts in found.items():
            self.counts[name] = self.counts.get(name, 0) + counts

    def _parts(self, codes: list[np.ndarray]) -> dict[str, tuple[np.ndarray, int]]:
        """{name: (codes, entries of their codebook)}."""
        q = self.config
        if q.kind == "rq":
            return {f"depth_{d}": (codes[0][..., d], q.codes_of(0)) for d in range(codes[0].shape[-1])}
        if q.kind == "two_level":
            bottom = 0 if q.shared else 1
            return {"top": (codes[0], q.codes_of(0)), "bottom": (codes[1], q.codes_of(bottom))}
        names = ["codebook"] if len(codes) == 1 else [f"level_{i}" for i in range(len(codes))]
        return {name: (level, q.codes_of(i)) for i, (name, level) in enumerate(zip(names, codes))}

    def summary(self) -> dict[str, dict[str, float]]:
        """{name: {"codes", "usage", "perplexity"}}; of a table that levels or depths share also `table`, all of them together."""
        return {
            name: {
                "codes": len(counts),
                "usage": float((counts > 0).mean()),
                "perplexity": float(perplexity(jnp.asarray(counts, jnp.float32))),
            }
            for name, counts in self.counts.items()
        }
