"""Random numbers of one sample, by name: a pure function of (seed, epoch, sample, k), so that a run can stop and go on anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import struct


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of sample `index` in `epoch`; draw k is the same whoever asks for it, in whatever order."""

    seed: int
    epoch: int
    index: int

    def uniform(self, k: int) -> float:
        """Draw k in [0, 1)."""
        counter = struct.pack("<4q", self.seed, self.epoch, self.index, k)
        bits = int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little")
        return (bits >> 11) * 2.0**-53

    def integer(self, k: int, low: int, high: int) -> int:
        """Draw k as a whole number in low .. high, both included."""
        return low + int(self.uniform(k) * (high - low + 1))
