"""Convolutions 3 x 3 on CPUs with half of the multiplications: four outputs of a row at a time from six products instead of twelve.

    y = A [(G k) * (B x)]    along the width, F(4, 3) of Lavin & Gray (arXiv 1509.09308), after Winograd (1980)

Each of the six products is an ordinary convolution 3 x 1 of a picture of a quarter of the width, so XLA's own kernels do the work. In one
direction alone the sums are exact to a few 1e-6 of the largest value; in both they would lose another digit and read more memory than
they save. GPU libraries choose such algorithms themselves, and matrix units of TPUs gain nothing from smaller products.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

TILE = 4  # outputs at a time
B = np.array(  # of six pixels, what each product reads
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
G = np.array(  # of three taps, what each product weighs with
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
A = np.array(  # of six products, each output
    [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ]
)
WIDE = 64  # channels below which sums cost more than the products they save
# pixels of a picture below which six kernels do: as they are, turned around for the gradient of x, and as their own gradients
FORWARD, TO_X, TO_KERNEL = 1024, 4096, 64
THIN = 8  # channels whose nine places are cheap to lay side by side
FEW = 256  # pixels of all pictures up to which turning a kernel around costs more than moving what its nine places give


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Cross-correlation of [B, H, W, I] with [3, 3, I, O], zeros of one pixel around: [B, H, W, O]; keeps x and the kernel alone."""
    return (by_products if _saves(x, kernel, FORWARD) else plain)(x, kernel, "HWIO")


def _kept(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x, kernel), (x, kernel)


def _gradients(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    if math.prod(x.shape[:3]) <= FEW:
        to_x = x_by_places(g, kernel)
    else:
        to_x = (by_products if _saves(x, kernel, TO_X) else plain)(g, kernel[::-1, ::-1], "HWOI")
    if _saves(x, kernel, TO_KERNEL):
        to_kernel = kernel_by_products(x, g)
    elif min(kernel.shape[2:]) <= THIN:
        to_kernel = kernel_of_thin(x, g)
    else:
        to_kernel = jax.vjp(lambda k: plain(x, k, "HWIO"), kernel)[1](g)[0]
    return to_x, to_kernel


convolve.defvjp(_kept, _gradients)


def _saves(x: jax.Array, kernel: jax.Array, pixels: int) -> bool:
    return min(kernel.shape[2:]) >= WIDE and x.shape[1] * x.shape[2] >= pixels


def plain(x: jax.Array, kernel: jax.Array, order: str) -> jax.Array:
    """XLA's convolution; order: of the kernel's axes, HWIO or HWOI."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", order, "NHWC"))


def by_products(x: jax.Array, kernel: jax.Array, order: str) -> jax.Array:
    """The same, by six products."""
    numbers = ("NHWC", order, "NHWC")
    pairs = zip(_windows(x), _combine(G, [kernel[:, i] for i in range(3)]))
    found = [jax.lax.conv_general_dilated(v, w[:, None], (1, 1), "VALID", dimension_numbers=numbers) for v, w in pairs]
    y = jnp.stack(_combine(A, found), 3)
    return y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, : x.shape[2]]


def kernel_by_products(x: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient [3, 3, I, O] from x [B, H, W, I] and that of the result g [B, H, W, O]: the six products transposed."""
    h = g.shape[1]
    g = jnp.pad(g, ((0, 0), (0, 0), (0, -g.shape[2] % TILE), (0, 0)))
    of_products = _combine(A.T, [g[:, :, i::TILE] for i in range(TILE)])
    windows = _windows(x)
    by_row = [[_contract(v[:, i : i + h], d) for v, d in zip(windows, of_products)] for i in range(3)]
    return jnp.stack([jnp.stack(_combine(G.T, row)) for row in by_row])


def x_by_places(g: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient [B, H, W, I] from that of the result g [B, H, W, O]: one product with the kernel as it lies, whose nine places then move."""
    b, h, w, o = g.shape
    found = g.reshape(-1, o) @ kernel.reshape(-1, o).T
    found = jnp.pad(found.reshape(b, h, w, 3, 3, -1), ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0)))
    return sum(found[:, 2 - r : 2 - r + h, 2 - c : 2 - c + w, r, c] for r in range(3) for c in range(3))


def kernel_of_thin(x: jax.Array, g: jax.Array) -> jax.Array:
    """The same gradient as one product, with the nine places of whichever has fewer channels side by side."""
    h, w = x.shape[1:3]
    i, o = x.shape[-1], g.shape[-1]

    def places(y: jax.Array) -> jax.Array:
        y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return jnp.concatenate([y[:, r : r + h, c : c + w] for r in range(3) for c in range(3)], -1)

    if i <= o:
        return _contract(places(x), g).reshape(3, 3, i, o)
    return _contract(x, places(g)).reshape(i, 3, 3, o)[:, ::-1, ::-1].transpose(1, 2, 0, 3)


def _contract(v: jax.Array, d: jax.Array) -> jax.Array:
    """[I, O] of [B, H, W, I] and [B, H, W, O], summed over all pixels; as one axis, over which contraction is fastest."""
    return jax.lax.dot_general(v.reshape(-1, v.shape[-1]), d.reshape(-1, d.shape[-1]), (((0,), (0,)), ((), ())))


def _windows(x: jax.Array) -> list[jax.Array]:
    """B times every six pixels of a row of x [B, H, W, I]: six of [B, H + 2, W / 4, I]."""
    w = -(-x.shape[2] // TILE) * TILE
    x = jnp.pad(x, ((0, 0), (1, 1), (1, w - x.shape[2] + TILE + 1), (0, 0)))
    return _combine(B, [x[:, :, i : i + w : TILE] for i in range(TILE + 2)])


def _combine(matrix: np.ndarray, parts: list[jax.Array]) -> list[jax.Array]:
    """matrix @ parts, zeros left out."""
    return [sum(float(a) * p if a != 1 else p for a, p in zip(row, parts) if a) for row in matrix]
