"""What one chip can do, from the vendors' data sheets, and the chips of a topology named like "v5e:16x16", "2xv5e:16x16" or "h100:8".

tpu   v4 | v5e | v5p | v6e : AxB (v5e, v6e) or AxBxC (v4, v5p)      gpu   a100 | h100 | h200 : GPUs on one node, or NODESxGPUS
      Nx in front: N such slices, joined by the data centre's network
"""

from __future__ import annotations

import dataclasses
import math
import re

from vlm_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: dense bfloat16 per second; memory: bytes that a program can use; bandwidth, links: bytes per second of the memory, and out
    of the chip over all its links at once. between: its share of what leaves a slice over the data centre's network, bytes per second;
    0 where several slices are not known (GPU nodes are sizes, and Google states no rate for v4).
    """

    name: str
    platform: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    dimensions: int = 1
    between: float = 0.0


# between: cloud.google.com/tpu/docs/v5e and v6e (6.4 and 25.6 Tbit/s of a pod of 256 chips), v5p (50 Gbit/s of a chip)
# usable memory of TPUs as their compiler states it; GPUs: what is left beside the driver and the CUDA context
CHIPS = {
    "v4": Chip("v4", "tpu", 275e12, 31.25 * GIB, 1228e9, 300e9, 3),
    "v5e": Chip("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 200e9, 2, 3.125e9),
    "v5p": Chip("v5p", "tpu", 459e12, 95.74 * GIB, 2765e9, 600e9, 3, 6.25e9),
    "v6e": Chip("v6e", "tpu", 918e12, 31.25 * GIB, 1640e9, 400e9, 2, 12.5e9),
    "a100": Chip("a100", "gpu", 312e12, 78 * GIB, 2039e9, 300e9),
    "h100": Chip("h100", "gpu", 989.5e12, 78 * GIB, 3350e9, 450e9),
    "h200": Chip("h200", "gpu", 989.5e12, 138 * GIB, 4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Equal slices of TPU pods, or GPUs of some nodes. sizes: of one slice."""

    chip: Chip
    sizes: tuple[int, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        """Number of chips, of all slices."""
        return self.slices * math.prod(self.sizes)

    @property
    def slice(self) -> str:
        """The name of one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"

    def __str__(self) -> str:
        return f"{self.slices}x{self.slice}" if self.slices > 1 else self.slice


def topology(name: str) -> Topology:
    """Parse "v5e:16x16", "2xv5e:16x16" or "h100:8"; ConfigError says what there is."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    if not found or found[2] not in CHIPS:
        raise ConfigError(
            f"--topology {name!r} is unknown: give CHIP:SIZES, e.g. v5e:16x16, v5p:2x2x4, 2xv5e:16x16 (two slices) or h100:8; "
            f"chips are {', '.join(CHIPS)}"
        )
    slices, chip, sizes = int(found[1] or 1), CHIPS[found[2]], tuple(map(int, found[3].split("x")))
    wanted = (chip.dimensions,) if chip.platform == "tpu" else (1, 2)
    if len(sizes) not in wanted or min(sizes) < 1:
        example = "x".join(["4"] * chip.dimensions) if chip.platform == "tpu" else "8"
        raise ConfigError(
            f"--topology {name!r}: {chip.name} takes {wanted[0]} sizes of at least 1, e.g. {chip.name}:{example}"
        )
    if slices < 1 or (slices > 1 and not chip.between):
        several = ", ".join(c.name for c in CHIPS.values() if c.between)
        raise ConfigError(
            f"--topology {name!r}: several slices, at least 1, are planned for {several}; GPU nodes are sizes, h100:2x8"
        )
    return Topology(chip, sizes, slices)
