"""How a prior over codes is trained: what it adds to the run's common hyperparameters."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ATTENTIONS, REMATS, ConfigError, at_least_one, one_of
from vlm_jax.train.options import RunConfig


@dataclasses.dataclass(frozen=True)
class PriorTrainConfig(RunConfig):
    """Hyperparameters of one run of a prior; the defaults are LlamaGen's class-conditional ones.

    schedule: of the rate behind the warm-up. average: decay of the moving average of the weights, 0 keeps none. dtype: of activations.
    loss_chunk: codes of an image whose logits exist at one time (LlamaGen's prior).
    """

    epochs: int = 300
    global_batch: int = 256
    lr: float = 1e-4
    weight_decay: float = 0.05
    beta2: float = 0.95
    warmup_ratio: float = 0.0
    schedule: str = "constant"
    average: float = 0.0
    dtype: str = "bfloat16"
    attention: str = "auto"
    remat: str = "none"
    loss_chunk: int = 256
    log_every: int = 100
    save_every: int = 5000

    def __post_init__(self):
        super().__post_init__()
        one_of("train.schedule", self.schedule, ("constant", "cosine", "linear"))
        one_of("train.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("train.attention", self.attention, ATTENTIONS)
        one_of("train.remat", self.remat, REMATS)
        at_least_one("train", self, ("loss_chunk",))
        if not 0 <= self.average < 1:
            raise ConfigError(f"train.average={self.average} must be at least 0 and below 1")
