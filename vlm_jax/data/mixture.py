"""Which records an epoch has: several sources, each read through its own shuffled passes, in a random interleaving.

    stream of a source   pass 0 | pass 1 | ...    each a permutation of its records, keyed by (seed, name, pass) alone
    epoch e              takes the next `count` of every stream, count being the same in every epoch;
                         which source stands where is a shuffle keyed by (seed, e)

    concatenation        count = repeat * min(limit, records)       limit 0: all, repeat 0: left out
    weighted             count = weight's share of epoch_samples    shares in whole samples, by largest remainder

The j-th place of a source always takes the next of its own stream, so another weight, limit or source moves samples
between epochs but never changes the order in which a source gives its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.data.options import Source
from vlm_jax.data.packing import permutation

INTERLEAVING = 2  # the stream of `permutation` that mixes sources; packing uses 0 and 1


def used_sources(sources: Mapping[str, Source], epoch_samples: int = 0) -> dict[str, Source]:
    """The sources that are not left out (repeat=0), checked: either all of them have a weight or none has.

    A missing weight is refused rather than read as "none of it", because 0 is what a forgotten weight looks like.
    """
    used = {name: source for name, source in sources.items() if source.repeat}
    if not used:
        raise ConfigError("every source of data.sources has repeat=0: there is nothing left to train on")
    weighted = [name for name, source in used.items() if source.weight]
    for name, source in used.items():
        if weighted and not source.weight:
            raise ConfigError(
                f"the source {name} has no weight, but {weighted[0]} has: set data.sources.{name}.weight, or repeat=0 to "
                "leave it out (files of data.path have no weight, move them to data.sources)"
            )
        if source.weight and source.repeat != 1:
            raise ConfigError(
                f"data.sources.{name} has weight={source.weight:g} and repeat={source.repeat}: a weight already says how "
                "often its records come, remove repeat"
            )
    if epoch_samples and not weighted:
        raise ConfigError(
            f"data.epoch_samples={epoch_samples} needs weights: set data.sources.NAME.weight of every source, or use limit"
        )
    return used


class Mixture:
    """The samples of every epoch, numbered through the sources one after another.

    sources: name -> (Source, number of its records). epoch_samples: samples in an epoch of a weighted mixture; 0: one pass over
    every source. Raises ConfigError for settings that give nothing.
    """

    def __init__(self, sources: Mapping[str, tuple[Source, int]], epoch_samples: int = 0, seed: int = 0):
        used = used_sources({name: source for name, (source, _) in sources.items()}, epoch_samples)
        self.names, self.seed = tuple(used), seed
        self._keys = [_key(name) for name in used]
        sizes = np.array([size for _, size in sources.values()], np.int64)
        chosen = np.array([name in used for name in sources])
        self.sizes, self._first = sizes[chosen], (np.cumsum(sizes) - sizes)[chosen]
        if not self.sizes.all():
            raise ConfigError(f"the source {self.names[int(self.sizes.argmin())]} has no usable record: leave it out")
        limits = np.array([source.limit or size for source, size in zip(used.values(), self.sizes)])
        a_pass = np.minimum(limits, self.sizes)
        weights = np.array([source.weight for source in used.values()])
        if weights.any():
            self.counts = shares(weights, epoch_samples or int(a_pass.sum()))
        else:
            self.counts = a_pass * np.array([source.repeat for source in used.values()])
        if not self.counts.all():
            name = self.names[int(self.counts.argmin())]
            raise ConfigError(
                f"data.sources.{name}.weight={used[name].weight:g} gives the source none of the {self.counts.sum()} samples "
                "of an epoch: raise it or data.epoch_samples, or leave it out with repeat=0"
            )

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self.counts.sum())

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the records of `epoch` in their order, int64 [len(self)]."""
        return self.samples(epoch)[0]

    def samples(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(`order`, how many passes over its source each sample had before it), both int64 [len(self)]."""
        which = np.repeat(np.arange(len(self.names)), self.counts)
        which = which[permutation(len(which), self.seed, epoch, INTERLEAVING)]
        records, passes = np.empty_like(which), np.empty_like(which)
        for k, count in enumerate(self.counts.tolist()):
            here = which == k
            numbers, turns = self._stream(k, epoch * count, (epoch + 1) * count)
            records[here], passes[here] = numbers + self._first[k], turns
        return records, passes

    def _stream(self, k: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(record inside the source, pass) of places start..stop in the stream of source k, int64."""
        size = int(self.sizes[k])
        first, last = start // size, (stop - 1) // size
        passes = [permutation(size, self.seed, number, self._keys[k]) for number in range(first, last + 1)]
        inside = slice(start - first * size, stop - first * size)
        return np.concatenate(passes)[inside], np.repeat(np.arange(first, last + 1), size)[inside]


def shares(weights: np.ndarray, total: int) -> np.ndarray:
    """`total` in whole parts proportional to `weights`, int64: rounded down, the rest to the largest remainders.

    >>> shares(np.array([2.0, 1.0]), 10)
    array([7, 3])
    """
    exact = total * (weights / weights.sum())
    parts = np.floor(exact).astype(np.int64)
    missing = total - int(parts.sum())
    parts[np.argsort(-(exact - parts), kind="stable")[:missing]] += 1
    return parts


def _key(name: str) -> int:
    """A number of a name that is the same everywhere."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
