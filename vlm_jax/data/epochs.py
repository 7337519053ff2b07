"""The rows of all epochs by number: which samples share row k of a run, known from lengths alone.

    global row   0 ... of epoch 0 | of epoch 1 | ...      epochs differ by a few rows, each is shuffled before it is packed

A row is a pure function of the manifest, the mixture, `Packing` and the seed: a restart, or another host, computes it again.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import threading
from collections.abc import Callable, Mapping

import numpy as np

from vlm_jax.config import VLMConfig
from vlm_jax.data import packing, sampler
from vlm_jax.data.manifest import Layout, Manifest
from vlm_jax.data.measuring import Limits
from vlm_jax.data.mixture import Mixture
from vlm_jax.data.options import Source
from vlm_jax.data.tasks import Sample

PLANS_KEPT = 8  # epochs whose plan stays in memory: readers run ahead over the end of an epoch
GROUPING = 3  # first stream of `permutation` for group_by_modality_length, which draws up to three


@dataclasses.dataclass(frozen=True)
class Packing:
    """How samples share rows, in which order and for how long.

    row_length slots, view_budget image views and (encoder-decoder models) answer_length answer slots per row, sample_length slots
    per sample (default: a row), max_samples per row (1: unpacked). order: see DataConfig; `group` is the number of rows of a step,
    which "modality_length" fills with samples of like length. shared_images: samples with the same images come into one row and share
    its views (order "packed").

    epochs passes in an order drawn from seed, and more until there are least_rows. sources, epoch_samples: see `data.mixture`
    (default: every source once). Up to max_bad broken samples (None: any number) and max_bad_share unusable ones are left out.
    """

    row_length: int = 4096
    view_budget: int = 6
    sample_length: int | None = None
    max_samples: int | None = None
    window: int = packing.WINDOW
    seed: int = 0
    epochs: int = 1
    max_bad: int | None = None
    max_bad_share: float = 1.0
    answer_length: int = 1024
    order: str = "packed"
    group: int = 1
    least_rows: int = 0
    shared_images: bool = False
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    epoch_samples: int = 0

    @property
    def limits(self) -> Limits:
        """What stops the run."""
        return Limits(self.max_bad, self.max_bad_share)

    def layout(self, encode: Callable[..., Sample], config: VLMConfig) -> Layout:
        """How samples are laid out and cut to what a row holds."""
        limit = min(self.sample_length or self.row_length, self.row_length)
        return Layout(encode, config, limit, self.view_budget, self.answer_length)

    def identity(self, limit: int, answers: bool) -> dict[str, str | int | None]:
        """What decides which samples share a row, under the names of the keys to set; limit: slots of a sample."""
        keys = {
            "data.row_length": self.row_length,
            "data.views_per_row": self.view_budget,
            "data.sample_length": limit,
            "data.max_samples": self.max_samples,
            "data.order": self.order,
            "data.epoch_samples": self.epoch_samples,
            "the packing window": self.window,
        }
        if answers:
            keys["data.answer_length"] = self.answer_length
        if self.order == "modality_length":
            keys["train.global_batch"] = self.group
        if self.shared_images:
            keys["data.shared_images"] = True
        return keys


class Epochs:
    """Rows 0 .. len - 1 of a run over the records of `manifests` (name -> manifest; numbered through them, one after another).

    groups int64 [records]: equal for records of a source with the same images; None unless they share their views.
    """

    def __init__(self, manifests: Mapping[str, Manifest], how: Packing):
        self.how, self.manifest = how, Manifest.join(list(manifests.values()))
        self.has_answers = bool(self.manifest.answers.any())
        self._usable = self.manifest.usable
        self.groups = _groups(list(manifests.values())) if how.shared_images else None
        counted = {name: (how.sources.get(name, Source()), len(m.usable)) for name, m in manifests.items()}
        self.mixture = Mixture(counted, how.epoch_samples, how.seed)
        self._plans: collections.OrderedDict[int, packing.Plan] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._ends: list[int] = []  # global row after the last of each epoch
        while len(self._ends) < how.epochs or len(self) < how.least_rows:
            self._ends.append(len(self) + len(self.plan(len(self._ends))))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def starts(self) -> tuple[int, ...]:
        """Global row that each epoch begins with."""
        return (0, *self._ends[:-1])

    def plan(self, epoch: int) -> packing.Plan:
        """The rows of `epoch`; its samples are record numbers."""
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._make(epoch)
                if len(self._plans) > PLANS_KEPT:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(epoch)
            return self._plans[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """Global row -> (epoch, row inside it)."""
        epoch = bisect.bisect_right(self._ends, row)
        return epoch, row - (self._ends[epoch - 1] if epoch else 0)

    def samples_of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers, passes) of the records that share global row `row`: each one's earlier passes over its source are counted."""
        epoch, inside = self.locate(row)
        plan = self.plan(epoch)
        return plan[inside], plan.passes_of(inside)

    def _make(self, epoch: int) -> packing.Plan:
        h, m = self.how, self.manifest
        chosen, passes = self.mixture.samples(epoch)
        chosen = self._usable[chosen]
        n = len(chosen)
        if h.order == "packed":
            answers = (m.answers[chosen], h.answer_length) if self.has_answers else (None, 0)
            limits = h.row_length, h.view_budget, h.seed, epoch, h.window, h.max_samples
            groups = None if self.groups is None else self.groups[chosen]
            made = packing.plan(m.lengths[chosen], m.views[chosen], *limits, np.arange(n), *answers, groups)
        else:
            order = np.arange(n) if h.order == "shuffled" else self._by_modality(m.words[chosen], epoch)
            made = packing.Plan(np.arange(n + 1), order)
        return packing.Plan(made.starts, chosen[made.samples].astype(np.int32), passes[made.samples].astype(np.int32))

    def _by_modality(self, words: np.ndarray, epoch: int) -> np.ndarray:
        """LLaVA's order of samples with these lengths: a step of `group` rows is one of its mega-batches."""
        streams = iter(range(GROUPING, GROUPING + 3))

        def permute(n: int) -> list[int]:
            return packing.permutation(n, self.how.seed, epoch, next(streams)).tolist()

        # one sample to a row: to deal a mega-batch to `group` chunks of one or to one chunk of `group` is the same
        return np.asarray(sampler.group_by_modality_length(words.tolist(), self.how.group, 1, permute))


def _groups(manifests: list[Manifest]) -> np.ndarray:
    """Per source, because a checkpoint keeps of every source by itself which of its samples are alike."""
    ends = np.cumsum([len(part) for part in manifests])
    return np.concatenate([part.alike() + end - len(part) for part, end in zip(manifests, ends)])
