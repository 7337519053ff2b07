"""How a visual tokenizer is trained: what it adds to the run's common hyperparameters, and its learning-rate schedule.

    t = update + 1 of total + 1                        warm-up: lr min(1, t / warmup)
    cosine, t > warmup:  lr = min_lr + (lr - min_lr) (1 + cos(pi (t - warmup) / (total - warmup))) / 2
The original programs' clocks, by name of `compat.schedule`: rq t = update; hq t = update + 1; unicode as hq over twice the steps, so
that its cosine stops half-way.
"""

from __future__ import annotations

import dataclasses
import math

from vlm_jax.config import ConfigError, one_of
from vlm_jax.train.options import RunConfig


@dataclasses.dataclass(frozen=True)
class TokenizerCompat:
    """Quirks of published training code, off unless such a run is to be reproduced.

    schedule: "" (neither the first nor the last update is void), or the clock of a program: rq, hq, unicode. two_pass: the critic is
    shown pictures of a second pass with the new weights, and codebooks follow the averages of both passes (HQ-VAE, UniCode).
    """

    schedule: str = ""
    two_pass: bool = False

    def __post_init__(self):
        one_of("train.compat.schedule", self.schedule, ("", "rq", "hq", "unicode"))


@dataclasses.dataclass(frozen=True)
class TokenizerTrainConfig(RunConfig):
    """Hyperparameters of one run of a visual tokenizer and its critic; both have an Adam of these settings and are clipped apart.

    The critic's learning rate is a group: group_lrs=(("^critic/", 1e-4),). schedule: constant or cosine, down to min_lr.
    average: decay of the moving average of the weights, 0 keeps none. tail: share of the updates, at the end, in which the codebook
    of a language-driven tokenizer is the language model's; before, it is drawn there evenly. dtype: of convolutions; the search and
    the codebooks are float32.
    """

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float | None = None
    warmup_ratio: float = 0.0
    schedule: str = "constant"
    min_lr: float = 0.0
    average: float = 0.0
    tail: float = 0.1
    dtype: str = "float32"
    log_every: int = 100
    save_every: int = 5000
    compat: TokenizerCompat = TokenizerCompat()

    def __post_init__(self):
        super().__post_init__()
        one_of("train.schedule", self.schedule, ("constant", "cosine"))
        one_of("train.dtype", self.dtype, ("float32", "bfloat16"))
        for key in ("average", "tail"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"train.{key}={getattr(self, key)} must be at least 0 and below 1")
        if self.accum != 1:
            raise ConfigError(
                f"train.accum={self.accum}: batch norms and codebooks follow whole batches, so a visual tokenizer is trained with "
                "accum=1; lower train.global_batch or use more devices"
            )


def rate_factor(config: TokenizerTrainConfig, update: int, total: int) -> float:
    """What multiplies every group's learning rate in update 0, 1, ... total-1; see the module."""
    warmup, clock = config.warmup(total), config.compat.schedule
    t = update + (clock != "rq")
    if t < warmup:
        return t / warmup
    if config.schedule == "constant" or t == warmup:
        return 1.0
    span = {"": total + 1, "unicode": 2 * total}.get(clock, total) - warmup
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * (1 + math.cos(math.pi * (t - warmup) / max(1, span))) / 2


def ramp(config: TokenizerTrainConfig, total: int) -> int:
    """Updates after which the codebook of a language-driven tokenizer is the language model's."""
    return max(1, round((1 - config.tail) * total))
