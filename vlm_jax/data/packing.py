"""Several samples in one row of T slots: the plan, from lengths alone before any image is read, and the rows.

    sample       tokens       5  7  <image>  9  4      labels  .  .  .  9  4
    slots        tokens       5  7  0  0  0  9  4      of an image with three slots
                 image_slots -1 -1  0  1  2 -1 -1
                 targets      .  .  .  .  9  4  .      the label of the next slot
    row          [ sample | sample | ... | padding ]   segments 1 1 .. 2 2 .. 0 0
    answers      [ answer | answer | ... | padding ]   of an encoder-decoder model: same samples, same segments

`plan` is first-fit-decreasing inside windows of a shuffled epoch: O(n log n) to sort, then one vector step
per sample rank that serves every window at once. It is a pure function of its arguments, so a row is
addressed by (seed, epoch, row).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.config import GENERATED, IGNORE, IMAGE
from vlm_jax.data import sharing
from vlm_jax.data.t5_text import answer_slots
from vlm_jax.data.tasks import Sample
from vlm_jax.models.slots import NEWLINE

WINDOW = 4096  # samples packed together; all 665K at once would fill rows 0.1 % better (launch/bench/packing.py)


@dataclasses.dataclass(frozen=True)
class Slots:
    """One sample in slots, arrays [n]: tokens, image_slots, targets int32, weights float32 (see the module).

    image_slots: -1 text, NEWLINE, or a feature index counted from the sample's first view. answer int32 [m]: what a decoder has to
    say, None for decoder-only models. cut: slots of the sample that did not fit.
    """

    tokens: np.ndarray
    image_slots: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    answer: np.ndarray | None = None
    cut: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


def truncate(sample: Sample, image_slots: Sequence[int], limit: int, answer_limit: int | None = None) -> Sample | None:
    """The longest beginning of a sample that takes at most `limit` slots, image k taking image_slots[k].

    No image is ever cut. None if nothing supervised would be left: such a sample is rejected and counted. An answer (of an
    encoder-decoder model) keeps its first `answer_limit` tokens, and all images, because it may be about any of them.
    """
    takes = _takes(sample, image_slots)
    kept = int(np.searchsorted(np.cumsum(takes), limit, side="right"))
    tokens, labels = sample.tokens[:kept], sample.labels[:kept]
    shown, answer = int((tokens == IMAGE).sum()), sample.answer
    if answer is None:
        supervised = bool((labels[1:] != IGNORE).any())
    else:
        answer = answer[:answer_limit]
        supervised = len(answer) > 0 and kept > 0 and shown == len(image_slots)
    if not supervised:
        return None
    drawn = sample.generated[: int((tokens == GENERATED).sum())]
    return Sample(tokens, labels, sample.images[:shown], drawn, answer)


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
    return Slots(tokens, placed, targets, supervised.astype(np.float32), sample.answer)


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Static sizes of a row: T slots, I view budget, S pixels per side, P features per view, U answer slots (0: decoder-only).

    key, view_shape, dtype: what a row holds per view, where it is not pixels uint8 [S, S, 3].
    """

    slots: int
    views: int
    pixels: int
    features: int
    answers: int = 0
    key: str = "images"
    view_shape: tuple[int, ...] = ()
    dtype: Any = np.uint8


@dataclasses.dataclass(frozen=True)
class Piece:
    """A sample's place in a row and what is in it, which may be less; slots None: an image turned out to be broken, padding.

    length slots, `views` image views and `answers` answer slots are reserved; pixels uint8 [v, S, S, 3], v <= views. like: number of
    an earlier piece of the row with the same images; its views are shown, and none are reserved.
    """

    length: int
    views: int
    slots: Slots | None
    pixels: np.ndarray | None
    answers: int = 0
    like: int | None = None


def build_row(pieces: Sequence[Piece], shape: RowShape) -> dict[str, np.ndarray]:
    """One row of a batch; without pieces it is all padding.

    tokens, targets (0 where not supervised), segments (1.. per sample, 0 padding), positions (restart per
    sample), image_slots (-1 text; v*P + p feature p of the row's view v; I*P image_newline): int32 [T].
    weights float32 [T]. images uint8 [I, S, S, 3] (or what RowShape says), zeros where unused.
    With answers also answer_tokens (what the decoder reads), answer_targets, answer_segments, answer_positions
    int32 [U] and answer_weights float32 [U]; a sample has the same segment number in both.
    """
    row = {name: np.zeros(shape.slots, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    row["image_slots"] = np.full(shape.slots, -1, np.int32)
    row["weights"] = np.zeros(shape.slots, np.float32)
    row[shape.key] = np.zeros((shape.views, *(shape.view_shape or (shape.pixels, shape.pixels, 3))), shape.dtype)
    if shape.answers:
        names = ("answer_tokens", "answer_targets", "answer_segments", "answer_positions")
        row |= {name: np.zeros(shape.answers, np.int32) for name in names}
        row["answer_weights"] = np.zeros(shape.answers, np.float32)
    at, free, answer, first_views = 0, 0, 0, []
    for number, piece in enumerate(pieces, start=1):
        view = free if piece.like is None else first_views[piece.like]
        first_views.append(view)
        if piece.slots is not None:
            s, here = piece.slots, slice(at, at + len(piece.slots))
            row["tokens"][here], row["targets"][here], row["weights"][here] = s.tokens, s.targets, s.weights
            shifted = np.where(s.image_slots >= 0, s.image_slots + view * shape.features, s.image_slots)
            newline = shape.views * shape.features
            row["image_slots"][here] = np.where(s.image_slots == NEWLINE, newline, shifted)
            row["segments"][here] = number
            row["positions"][here] = np.arange(len(s))
            if piece.pixels is not None:
                row[shape.key][view : view + len(piece.pixels)] = piece.pixels
            if s.answer is not None:
                _place_answer(row, s.answer, answer, number)
        at, answer = at + piece.length, answer + piece.answers
        free += piece.views if piece.like is None else 0
    return row


def _place_answer(row: dict[str, np.ndarray], answer: np.ndarray, at: int, number: int) -> None:
    """Write the decoder's side of sample `number` from answer slot `at` on."""
    here = slice(at, at + len(answer))
    row["answer_tokens"][here], row["answer_targets"][here], row["answer_weights"][here] = answer_slots(answer)
    row["answer_segments"][here] = number
    row["answer_positions"][here] = np.arange(len(answer))


def batch_rows(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack rows on a leading axis: the row batch [B, ...] that the models read."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of one epoch in CSR form: row r holds the samples numbered samples[starts[r]:starts[r+1]].

    passes [n]: how often each of `samples` was taken before (see data.mixture); None where nobody asks.
    """

    starts: np.ndarray
    samples: np.ndarray
    passes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.starts[row] : self.starts[row + 1]]

    def passes_of(self, row: int) -> np.ndarray:
        """`passes` of the samples in a row."""
        return self.passes[self.starts[row] : self.starts[row + 1]]


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
    answers: np.ndarray | None = None,
    answer_length: int = 0,
    groups: np.ndarray | None = None,
) -> Plan:
    """Which samples share a row in `epoch`: each of `order` once, within all budgets.

    A row has at most row_length slots, view_budget views, max_samples samples (1: unpacked training) and, where `answers` are given,
    answer_length answer slots.

    lengths, views, answers: [n] slots, image views and answer slots of every sample. `order` (default: all n, shuffled by seed and
    epoch) lets a mixture choose which samples an epoch has. groups [n]: samples with the same number show the same images; they are kept
    together, and their views count once in a row (data.sharing).
    """
    order = permutation(len(lengths), seed, epoch) if order is None else np.asarray(order)
    table = [(lengths, row_length, "slots"), (views, view_budget, "views")]
    table += [] if max_samples is None else [(np.ones(len(lengths)), max_samples, "samples")]
    table += [] if answers is None else [(answers, answer_length, "answer slots")]
    costs, limits = [np.asarray(column, np.int32)[order] for column, _, _ in table], [limit for _, limit, _ in table]
    for cost, (_, limit, word) in zip(costs, table):
        if (cost > limit).any():
            worst = order[int(cost.argmax())]
            raise ValueError(f"sample {worst} takes {cost.max()} {word}, more than the {limit} of a row")
    bins = (
        first_fit_decreasing(costs, limits, window) if groups is None else _bins(costs, limits, window, groups[order])
    )
    shuffled = permutation(bins.max(initial=-1) + 1, seed, epoch, 1)
    numbers = np.empty_like(shuffled)
    numbers[shuffled] = np.arange(len(shuffled))
    rows = numbers[bins]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(shuffled)))])
    return Plan(starts.astype(np.int64), order[np.argsort(rows, kind="stable")].astype(np.int32))


def _bins(costs: list[np.ndarray], limits: Sequence[int], window: int, groups: np.ndarray) -> np.ndarray:
    """`first_fit_decreasing` of bundles: all costs of a bundle add up but the second, that of views."""
    added = [0, *range(2, len(costs))]
    bundle = sharing.bundles(groups, [costs[k] for k in added], [limits[k] for k in added])
    united = [(sharing.largest if k == 1 else sharing.totals)(cost, bundle) for k, cost in enumerate(costs)]
    return first_fit_decreasing(united, limits, window)[bundle]


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """A shuffle of range(n) from raw Philox bits, the same under every numpy version; int64 [n].

    stream: any whole number >= 0, so that one (seed, epoch) has several.
    """
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
