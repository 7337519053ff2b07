"""How many devices lie along each mesh axis; free of jax, so that configs load fast."""

from __future__ import annotations

import dataclasses
import math

from vlm_jax.config import ConfigError

AXES = ("data", "fsdp", "tensor", "seq")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    seq: int = 1

    def resolve(self, devices: int) -> tuple[int, int, int, int]:
        """Axis sizes for `devices` devices, in the order of AXES."""
        sizes = [self.data, self.fsdp, self.tensor, self.seq]
        text = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes))
        if sizes.count(-1) > 1 or any(n == 0 or n < -1 for n in sizes):
            raise ConfigError(f"mesh ({text}) needs positive sizes, with -1 for at most one axis")
        known = math.prod(n for n in sizes if n != -1)
        if -1 in sizes and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        if math.prod(sizes) != devices:
            raise ConfigError(
                f"mesh ({text}) does not divide the {devices} devices there are: change the config keys under mesh, or on a CPU "
                "set JAX_NUM_CPU_DEVICES, which makes as many devices as it says"
            )
        return tuple(sizes)
