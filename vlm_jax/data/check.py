"""What `data check` finds in one pass over all records and images: numbers per source, per reason, and per row length.

records --encode--> manifest    lengths, views, reasons: measured as training measures it, and kept for it
        --decode--> images      those that cannot be read are found now instead of in the middle of a run
manifest --plan-->  fillings    how full rows of 2048, 4096, 8192 slots and of the recipe's own length get
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_jax.config import one_of
from vlm_jax.data import packing
from vlm_jax.data.epochs import Epochs, Packing
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.images import check_exists, image_size
from vlm_jax.data.sharing import views_shown

LOOKS = ("decode", "header", "skip")
ROW_LENGTHS = (2048, 4096, 8192)
WORTH = 0.01  # gain in filling that is worth a suggestion
FEW = 50  # rows of an epoch below which a last row that is half empty decides

Size = tuple[int, int]


class Gallery:
    """Looks at every image once, whoever asks; how: "decode" (as training does), "header", or "skip" (is the file there?).

    decode(image) -> (views, (w, h)) is the loader of the run. Threads may share a Gallery: at worst an image is looked at twice;
    other processes have their own.
    """

    def __init__(self, how: str, decode: Callable[[ImageSource], tuple[Any, Size]]):
        one_of("--images", how, LOOKS)
        self._how, self._decode = how, decode
        self._seen: dict[Any, Size | tuple[str, str]] = {}  # (width, height), or (reason, words)

    def look(self, image: ImageSource) -> Size:
        """(width, height), (0, 0) where only the file was looked for; ImageError if the image cannot be used."""
        key = (image.path, image.piece) if image.data is None else hashlib.blake2b(image.data, digest_size=16).digest()
        found = self._seen.get(key)
        if found is None:
            try:
                found = self._size(image)
            except ImageError as error:
                found = (error.reason, str(error).removeprefix(image.label))
            self._seen[key] = found
        if isinstance(found[0], str):
            raise ImageError(f"{image.label}{found[1]}", found[0])
        return found

    def _size(self, image: ImageSource) -> Size:
        if self._how == "skip":
            check_exists(image)
            return 0, 0
        return self._decode(image)[1] if self._how == "decode" else image_size(image)

    @property
    def broken(self) -> int:
        """Images that cannot be used."""
        return sum(isinstance(found[0], str) for found in self._seen.values())

    def __len__(self) -> int:
        return len(self._seen)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The samples of one epoch: slots, image views and answer slots of each, int [n]; groups: those that share views (data.sharing)."""

    lengths: np.ndarray
    views: np.ndarray
    answers: np.ndarray
    groups: np.ndarray | None = None

    @classmethod
    def of_epoch(cls, epochs: Epochs) -> Samples:
        """Those of the first epoch of a run."""
        m, chosen = epochs.manifest, epochs.manifest.usable[epochs.mixture.order(0)]
        groups = None if epochs.groups is None else epochs.groups[chosen]
        return cls(m.lengths[chosen], m.views[chosen], m.answers[chosen], groups)


@dataclasses.dataclass(frozen=True)
class Filling:
    """How an epoch fills rows of `row_length` slots and `views` image views.

    rows: rows of the epoch. slots_used, views_used: shares of all slots and views of those rows that hold data. left_out: samples
    with more views than a row.
    """

    row_length: int
    views: int
    rows: int
    slots_used: float
    views_used: float
    left_out: int = 0


def fill(samples: Samples, how: Packing, row_length: int, budget: int) -> Filling:
    """The samples in rows of `row_length` slots and `budget` views, answer slots in proportion; longer ones are cut."""
    fits = samples.views <= budget
    lengths, views = np.minimum(samples.lengths[fits], row_length), samples.views[fits]
    room = max(1, round(how.answer_length * row_length / how.row_length))
    answers = (np.minimum(samples.answers[fits], room), room) if samples.answers.any() else (None, 0)
    rows, shown = len(lengths), views.sum()
    if how.order == "packed":
        groups = None if samples.groups is None else samples.groups[fits]
        limits = row_length, budget, how.seed, 0, how.window, how.max_samples
        made = packing.plan(lengths, views, *limits, np.arange(len(lengths)), *answers, groups)
        rows = len(made)
        shown = shown if groups is None else views_shown(made.starts, made.samples, views, groups)
    used = [float(taken) / (max(rows, 1) * size) for taken, size in ((lengths.sum(), row_length), (shown, budget))]
    return Filling(row_length, budget, rows, *used, int((~fits).sum()))


def fillings(samples: Samples, how: Packing) -> list[Filling]:
    """`fill` at ROW_LENGTHS and the configured length, the views of a row in proportion, shortest rows first."""
    found = []
    for row_length in sorted({*ROW_LENGTHS, how.row_length}):
        budget = max(1, round(how.view_budget * row_length / how.row_length))
        found.append(fill(samples, how, row_length, budget))
    return found


def suggestion(found: Sequence[Filling], samples: Samples, how: Packing) -> str:
    """A sentence about settings that fill rows noticeably better; empty if there are none, samples do not share rows, or rows are FEW."""
    if how.order != "packed" or how.max_samples == 1 or not len(samples.lengths):
        return ""
    own = next(f for f in found if f.row_length == how.row_length)
    if own.rows < FEW:
        return ""
    more = fill(samples, how, how.row_length, 2 * how.view_budget)
    others = [f for f in found if f.left_out <= own.left_out and f.row_length != own.row_length]
    most = max(f.slots_used for f in (*others, more))
    if most < own.slots_used + WORTH:
        return ""
    best = next(f for f in (more, *others) if f.slots_used > most - WORTH)  # the smallest change, the shortest rows
    if best is more:
        best = _fewest_views(more, samples, how)
        change = f"data.views_per_row={best.views}"
    else:
        change = f"data.row_length={best.row_length} with data.views_per_row={best.views}"
    return (
        f"{change} would fill {best.slots_used:.1%} of the slots, data.row_length={own.row_length} with "
        f"data.views_per_row={own.views} fills {own.slots_used:.1%}"
    )


def _fewest_views(most: Filling, samples: Samples, how: Packing) -> Filling:
    """The smallest budget of views that fills nearly as well as `most` (a view without an image costs the tower's time)."""
    low, best = how.view_budget, most
    while best.views - low > 1:
        middle = (low + best.views) // 2
        found = fill(samples, how, how.row_length, middle)
        low, best = (low, found) if found.slots_used > most.slots_used - WORTH / 2 else (middle, best)
    return best
