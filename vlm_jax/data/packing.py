"""Several samples in one row of T slots: the plan, from lengths alone before any image is read, and the rows.

    sample       tokens       5  7  <image>  9  4      labels  .  .  .  9  4
    slots        tokens       5  7  0  0  0  9  4      of an image with three slots
                 image_slots -1 -1  0  1  2 -1 -1
                 targets      .  .  .  .  9  4  .      the label of the next slot
    row          [ sample | sample | ... | padding ]   segments 1 1 .. 2 2 .. 0 0

`plan` is first-fit-decreasing inside windows of a shuffled epoch: O(n log n) to sort, then one vector step
per sample rank that serves every window at once. It is a pure function of its arguments, so a row is
addressed by (seed, epoch, row).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlm_jax.config import IGNORE, IMAGE
from vlm_jax.data.tasks import Sample
from vlm_jax.models.slots import NEWLINE

WINDOW = 4096  # samples packed together: a larger window fills rows a little better and plans more slowly


@dataclasses.dataclass(frozen=True)
class Slots:
    """One sample in slots, arrays [n]: tokens, image_slots, targets int32, weights float32 (see the module).

    image_slots: -1 text, NEWLINE, or a feature index counted from the sample's first view.
    """

    tokens: np.ndarray
    image_slots: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def truncate(sample: Sample, image_slots: Sequence[int], limit: int) -> Sample | None:
    """The longest beginning of a sample that takes at most `limit` slots, image k taking image_slots[k].

    No image is ever cut. None if nothing supervised would be left: such a sample is rejected and counted.
    """
    takes = _takes(sample, image_slots)
    kept = int(np.searchsorted(np.cumsum(takes), limit, side="right"))
    tokens, labels = sample.tokens[:kept], sample.labels[:kept]
    if not (labels[1:] != IGNORE).any():
        return None
    return dataclasses.replace(
        sample, tokens=tokens, labels=labels, images=sample.images[: int((tokens == IMAGE).sum())]
    )


def _takes(sample: Sample, image_slots: Sequence[int]) -> np.ndarray:
    """Slots of each token, int64 [n]: 1 for text."""
    takes = np.ones(len(sample.tokens), np.int64)
    takes[sample.tokens == IMAGE] = image_slots
    return takes


def expand(sample: Sample, image_slots: Sequence[np.ndarray], views: Sequence[int], features: int) -> Slots:
    """Lay a sample out in slots; nothing is cut (see `truncate`).

    image_slots[i] (models.slots, relative to its first view) and views[i] belong to the i-th image;
    `features` is P.
    """
    where = np.flatnonzero(sample.tokens == IMAGE)
    takes = _takes(sample, [len(s) for s in image_slots])
    placed = np.full(int(takes.sum()), -1, np.int32)
    starts, first_view = np.cumsum(takes) - takes, 0
    for at, relative, count in zip(starts[where], image_slots, views):
        shifted = relative + first_view * features
        placed[at : at + len(relative)] = np.where(relative == NEWLINE, NEWLINE, shifted)
        first_view += count
    tokens = np.repeat(np.where(sample.tokens == IMAGE, 0, sample.tokens), takes).astype(np.int32)
    labels = np.where(placed == -1, np.repeat(sample.labels, takes), IGNORE)
    following = np.append(labels[1:], IGNORE)
    supervised = following != IGNORE
    targets = np.where(supervised, following, 0).astype(np.int32)
    return Slots(tokens, placed, targets, supervised.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Static sizes of a row: T slots, I view budget, S pixels per side, P features per view."""

    slots: int
    views: int
    pixels: int
    features: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A sample's place in a row and what is in it; slots None: an image turned out to be broken, padding."""

    length: int
    views: int
    slots: Slots | None
    pixels: np.ndarray | None


def build_row(pieces: Sequence[Piece], shape: RowShape) -> dict[str, np.ndarray]:
    """One row of a batch; without pieces it is all padding.

    tokens, targets (0 where not supervised), segments (1.. per sample, 0 padding), positions (restart per
    sample), image_slots (-1 text; v*P + p feature p of the row's view v; I*P image_newline): int32 [T].
    weights float32 [T]. images uint8 [I, S, S, 3], zeros where unused.
    """
    row = {name: np.zeros(shape.slots, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    row["image_slots"] = np.full(shape.slots, -1, np.int32)
    row["weights"] = np.zeros(shape.slots, np.float32)
    row["images"] = np.zeros((shape.views, shape.pixels, shape.pixels, 3), np.uint8)
    at, view = 0, 0
    for number, piece in enumerate(pieces, start=1):
        here = slice(at, at + piece.length)
        if piece.slots is not None:
            s = piece.slots
            row["tokens"][here], row["targets"][here], row["weights"][here] = s.tokens, s.targets, s.weights
            shifted = np.where(s.image_slots >= 0, s.image_slots + view * shape.features, s.image_slots)
            newline = shape.views * shape.features
            row["image_slots"][here] = np.where(s.image_slots == NEWLINE, newline, shifted)
            row["segments"][here] = number
            row["positions"][here] = np.arange(piece.length)
            if piece.pixels is not None:
                row["images"][view : view + piece.views] = piece.pixels
        at, view = at + piece.length, view + piece.views
    return row


def batch_rows(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack rows on a leading axis: the row batch [B, ...] that the models read."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of one epoch in CSR form: row r holds the samples numbered samples[starts[r]:starts[r+1]]."""

    starts: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.starts[row] : self.starts[row + 1]]


def plan(
    lengths: np.ndarray,
    views: np.ndarray,
    row_length: int,
    view_budget: int,
    seed: int,
    epoch: int,
    window: int = WINDOW,
    max_samples: int | None = None,
    order: np.ndarray | None = None,
) -> Plan:
    """Which samples share a row in `epoch`: each of `order` once, within both budgets.

    A row has at most row_length slots, view_budget views and max_samples samples (1: unpacked training).

    lengths, views: [n] slots and image views of every sample. `order` (default: all n, shuffled by seed and
    epoch) lets a mixture choose which samples an epoch has.
    """
    order = permutation(len(lengths), seed, epoch) if order is None else np.asarray(order)
    costs = [np.asarray(c, np.int32)[order] for c in (lengths, views, np.ones(len(lengths)))]
    limits = [row_length, view_budget, max_samples or max(len(order), 1)]
    for cost, limit, word in zip(costs, limits, ("slots", "views", "samples")):
        if (cost > limit).any():
            worst = order[int(cost.argmax())]
            raise ValueError(f"sample {worst} takes {cost.max()} {word}, more than the {limit} of a row")
    bins = first_fit_decreasing(costs, limits, window)
    shuffled = permutation(bins.max(initial=-1) + 1, seed, epoch, stream=1)
    numbers = np.empty_like(shuffled)
    numbers[shuffled] = np.arange(len(shuffled))
    rows = numbers[bins]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(shuffled)))])
    return Plan(starts.astype(np.int64), order[np.argsort(rows, kind="stable")].astype(np.int32))


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """A shuffle of range(n) from raw Philox bits, the same under every numpy version; int64 [n]."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(n)
    return np.argsort(bits, kind="stable")


def first_fit_decreasing(costs: Sequence[np.ndarray], limits: Sequence[int], window: int) -> np.ndarray:
    """Bin of every item, int64 [n], numbered from 0 without gaps; every `window` items on their own.

    An item goes to the first bin of its window where it fits under every limit, largest items first (sum of
    the fractions of the limits that it takes). All windows advance together, so the Python loop has `window`
    steps whatever n is.
    """
    n = len(costs[0])
    if n == 0:
        return np.zeros(0, np.int64)
    width = min(window, n)
    windows = -(-n // width)
    missing = windows * width - n  # filled with items of no cost, which fit anywhere
    padded = [np.pad(c, (0, missing)).reshape(windows, width) for c in costs]
    size = np.sum([c / max(limit, 1) for c, limit in zip(padded, limits)], axis=0)
    ranks = np.argsort(-size, axis=1, kind="stable")
    padded = [np.take_along_axis(c, ranks, axis=1).T.copy() for c in padded]  # [width, windows]
    left = [np.full((windows, width), limit, np.int32) for limit in limits]
    chosen, every, opened = np.empty((width, windows), np.int64), np.arange(windows), 1
    for rank in range(width):
        fits = left[0][:, :opened] >= padded[0][rank][:, None]
        for room, cost in zip(left[1:], padded[1:]):
            fits &= room[:, :opened] >= cost[rank][:, None]
        first = chosen[rank] = fits.argmax(axis=1)
        for room, cost in zip(left, padded):
            room[every, first] -= cost[rank]
        opened = min(max(opened, int(first.max()) + 2), width)  # always one empty bin in view
    bins = np.empty((windows, width), np.int64)
    np.put_along_axis(bins, ranks, chosen.T, axis=1)
    real = np.arange(windows * width).reshape(windows, width) < n
    used = np.where(real, bins, -1).max(axis=1) + 1
    return (bins + (np.cumsum(used) - used)[:, None]).reshape(-1)[:n]
