"""What one chip can do, from the vendors' data sheets, and the chips of a topology named like "v5e:16x16" or "h100:8".

tpu   v4 | v5e | v5p | v6e : AxB (v5e, v6e) or AxBxC (v4, v5p)      gpu   a100 | h100 | h200 : GPUs on one node, or NODESxGPUS
"""

from __future__ import annotations

import dataclasses
import re

from vlm_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: dense bfloat16 per second; memory: bytes that a program can use; bandwidth, links: bytes per second of the memory, and out
    of the chip over all its links at once.
    """

    name: str
    platform: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    dimensions: int = 1


# usable memory of TPUs as their compiler states it; GPUs: what is left beside the driver and the CUDA context
CHIPS = {
    "v4": Chip("v4", "tpu", 275e12, 31.25 * GIB, 1228e9, 300e9, 3),
    "v5e": Chip("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 200e9, 2),
    "v5p": Chip("v5p", "tpu", 459e12, 95.74 * GIB, 2765e9, 600e9, 3),
    "v6e": Chip("v6e", "tpu", 918e12, 31.25 * GIB, 1640e9, 400e9, 2),
    "a100": Chip("a100", "gpu", 312e12, 78 * GIB, 2039e9, 300e9),
    "h100": Chip("h100", "gpu", 989.5e12, 78 * GIB, 3350e9, 450e9),
    "h200": Chip("h200", "gpu", 989.5e12, 138 * GIB, 4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod, or GPUs of some nodes."""

    chip: Chip
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of chips."""
        total = 1
        for n in self.sizes:
            total *= n
        return total

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"


def topology(name: str) -> Topology:
    """Parse "v5e:16x16" or "h100:8"; ConfigError says what there is."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in CHIPS:
        raise ConfigError(
            f"--topology {name!r} is unknown: give CHIP:SIZES, e.g. v5e:16x16, v5p:2x2x4 or h100:8; chips are {', '.join(CHIPS)}"
        )
    chip, sizes = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    wanted = (chip.dimensions,) if chip.platform == "tpu" else (1, 2)
    if len(sizes) not in wanted or min(sizes) < 1:
        example = "x".join(["4"] * chip.dimensions) if chip.platform == "tpu" else "8"
        raise ConfigError(
            f"--topology {name!r}: {chip.name} takes {wanted[0]} sizes of at least 1, e.g. {chip.name}:{example}"
        )
    return Topology(chip, sizes)
