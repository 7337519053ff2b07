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

    Of data.path, whose images are encoded at every step: soft_temperature: of the labels, softmax(-distance / temperature) over all
    codes, of RQ and HQ tokenizers; 0 takes the nearest code alone. stochastic_codes: codes are drawn from the soft labels.
    tokenizer_dtype: of the tokenizer's convolutions; bfloat16 is faster and changes some codes.
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
    soft_temperature: float = 0.0
    stochastic_codes: bool = False
    tokenizer_dtype: str = "float32"
    log_every: int = 100
    save_every: int = 5000

    def __post_init__(self):
        super().__post_init__()
        one_of("train.schedule", self.schedule, ("constant", "cosine", "linear"))
        for key in ("dtype", "tokenizer_dtype"):
            one_of(f"train.{key}", getattr(self, key), ("float32", "bfloat16"))
        one_of("train.attention", self.attention, ATTENTIONS)
        one_of("train.remat", self.remat, REMATS)
        at_least_one("train", self, ("loss_chunk",))
        if not 0 <= self.average < 1:
            raise ConfigError(f"train.average={self.average} must be at least 0 and below 1")
        if self.soft_temperature < 0:
            raise ConfigError(
                f"train.soft_temperature={self.soft_temperature} must be at least 0, where 0 is hard codes"
            )
        if self.stochastic_codes and not self.soft_temperature:
            raise ConfigError(
                "train.stochastic_codes=True draws codes from soft labels: give train.soft_temperature, e.g. 0.5"
            )
