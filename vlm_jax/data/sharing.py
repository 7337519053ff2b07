"""Samples with the same images in one row: the tower and the projector run once for all of them.

    samples of an epoch   a1  b1  a2  c1  a3  text  b2          a, b, c: their images, 1, 2, 3: the questions about them
    bundles               [a1 a2 a3]  [b1 b2]  [c1]  [text]     slots of a bundle: those of all; views: those of one
    row                   views  A B      image_slots  a1 -> A   a2 -> A   a3 -> A   b1 -> B   b2 -> B

Every sample keeps its own segment, so what is computed for it is what it would be alone; what an encoder makes of the image depends
on the question and is not shared. Which samples are alike is a number each: that of the first with the same images in its source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from vlm_jax.data.image_source import ImageSource


def hash_of_images(images: Sequence[ImageSource], views: int) -> int:
    """64 bits that tell apart what samples show: their images, in order, in so many views; 0 without images."""
    if not images:
        return 0
    digest = hashlib.blake2b(str(views).encode(), digest_size=8)
    for image in images:
        path, piece, data = image.key
        name = f"{path}\0{piece}".encode("utf-8", "surrogatepass") if data is None else data
        digest.update(hashlib.blake2b(name, digest_size=16).digest())
    return int.from_bytes(digest.digest(), "little") or 1


def alike(shown: np.ndarray) -> np.ndarray:
    """Hashes uint64 [n] (`hash_of_images`) -> int64 [n]: the first sample that shows the same; its own number without images."""
    _, first, of = np.unique(shown, return_index=True, return_inverse=True)
    return np.where(shown == 0, np.arange(len(shown)), first[of])


def bundles(groups: np.ndarray, costs: Sequence[np.ndarray], limits: Sequence[int]) -> np.ndarray:
    """Bundle of every sample, int64 [n], numbered from 0 as they begin: samples of a group in order, as many as fit.

    costs, limits: what the samples of a bundle use up, each [n], and how much of it a row has. All groups advance together, so
    the Python loop has as many steps as the largest has samples.
    """
    n = len(groups)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.diff(np.append(starts, n))
    largest_first = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[largest_first], sizes[largest_first]
    left, opens = [np.full(len(starts), -1, np.int64) for _ in limits], np.zeros(n, bool)
    for rank in range(sizes.max(initial=0)):
        going = int(np.searchsorted(-sizes, -rank))  # groups with more than `rank` samples
        at = starts[:going] + rank
        used = [cost[order[at]] for cost in costs]
        full = np.any([room[:going] < cost for room, cost in zip(left, used)], axis=0)
        for room, cost, limit in zip(left, used, limits):
            room[:going] = np.where(full, limit, room[:going]) - cost
        opens[at] = full
    found = np.empty(n, np.int64)
    found[order] = np.cumsum(opens) - 1
    _, first = np.unique(found, return_index=True)
    number = np.empty_like(first)
    number[np.argsort(first)] = np.arange(len(first))
    return number[found]


def largest(values: np.ndarray, bundle: np.ndarray) -> np.ndarray:
    """The largest of `values` [n] in each bundle, int32."""
    out = np.zeros(bundle.max(initial=-1) + 1, np.int32)
    np.maximum.at(out, bundle, values)
    return out


def totals(values: np.ndarray, bundle: np.ndarray) -> np.ndarray:
    """The sum of `values` [n] in each bundle, int32."""
    return np.bincount(bundle, values, bundle.max(initial=-1) + 1).astype(np.int32)


def views_shown(starts: np.ndarray, samples: np.ndarray, views: np.ndarray, groups: np.ndarray) -> int:
    """Views of all rows of a plan (starts, samples) together, those that samples of a row share counted once."""
    row = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    _, once = np.unique(np.stack([row, groups[samples]]), axis=1, return_index=True)
    return int(views[samples[once]].sum())
