"""What XLA is told when it compiles a training step for TPUs.

XLA may turn a product with a gathered kernel into a ring: a loop that multiplies one device's part while it sends the next ("collective
matmul"). For kernels that fsdp cuts, this made a step of LLaVA-1.5 7B on v5e:4x8 send 1.6x as many bytes in 41,000 pieces, at
the same memory (`plan`); MaxText has a set of flags that turns it off.
"""

from __future__ import annotations

from typing import Any

import jax

NO_RINGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}  # only products larger than this become rings


def compile_step(lowered: jax.stages.Lowered, platform: str, **more: Any) -> jax.stages.Compiled:
    """Compile a training step for `platform`; more: further options of XLA. A compiler that knows no rings any longer goes without."""
    if platform != "tpu":
        return lowered.compile(more or None)
    try:
        return lowered.compile({**NO_RINGS, **more})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile(more or None)
