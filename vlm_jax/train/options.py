"""How a run is trained: frozen dataclasses, made from the `train` part of a config by config.from_dict."""

from __future__ import annotations

import dataclasses
import math
import re

from vlm_jax.config import ATTENTIONS, REMATS, ConfigError, at_least_one, one_of

STAGE1 = ("^projector/",)
STAGE2 = ("^(projector/|llm/|image_newline$)",)
LORA = (r"/lora_[ab]$", "^(projector/|image_newline$)")


@dataclasses.dataclass(frozen=True)
class Compat:
    """Quirks of published training code, off unless such a run is to be reproduced.

    loss_normalisation: "global_tokens" weighs every supervised token of a step alike; "per_microbatch"
        averages the means of the micro-batches (HF Trainer at transformers 4.37, where each is one device's
        share: set `accum` to devices x steps).
    zero_first_lr: HF's schedule, whose first update has learning rate 0. Otherwise neither the first nor the
        last update is void.
    logits_dtype: "bfloat16" rounds logits before the float32 loss, as a bfloat16 model of transformers does.
    """

    loss_normalisation: str = "global_tokens"
    zero_first_lr: bool = False
    logits_dtype: str = "float32"

    def __post_init__(self):
        one_of("train.compat.loss_normalisation", self.loss_normalisation, ("global_tokens", "per_microbatch"))
        one_of("train.compat.logits_dtype", self.logits_dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training run has: how long, in which batches, Adam and its schedule, logs and checkpoints.

    steps: updates in all; None: what `epochs` passes over the data give.
    global_batch: rows (images) per update, in `accum` micro-batches.
    group_lrs: (regular expression, learning rate), the first match wins over `lr`.
    no_decay: regular expressions of paths without weight decay.
    warmup_steps: None: ceil(warmup_ratio * steps). clip_norm: None does not clip. moment_dtype: of Adam's first moment.
    profile: (first, last) step of a jax.profiler trace. max_bad_samples: broken records and images that may be skipped before the
        run stops (None: data.max_bad_share alone decides). compile_cache: folder of compiled programs: "run" (inside the run's), a
        path, or empty for none (see train.compiled).
    """

    steps: int | None = None
    epochs: int = 1
    global_batch: int = 128
    accum: int = 1
    lr: float = 2e-5
    group_lrs: tuple[tuple[str, float], ...] = ()
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = (r"(^|/)(bias|scale)$",)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    moment_dtype: str = "float32"
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    profile: tuple[int, int] | None = None
    max_bad_samples: int | None = None
    tensorboard: bool = False
    wandb: bool = False
    compile_cache: str = "run"

    def __post_init__(self):
        one_of("train.moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
        at_least_one("train", self, ("global_batch", "accum", "log_every", "save_every", "keep"))
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"train.steps={self.steps} must be at least 1 (or None, to train for train.epochs)")
        if self.max_bad_samples is not None and self.max_bad_samples < 0:
            raise ConfigError(f"train.max_bad_samples={self.max_bad_samples} must not be negative")
        if self.global_batch % self.accum:
            raise ConfigError(f"train.global_batch={self.global_batch} is not a multiple of train.accum={self.accum}")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"the pattern {pattern!r} under train is not a regular expression: {error}") from None

    @property
    def patterns(self) -> tuple[str, ...]:
        """All regular expressions over parameter paths."""
        return (*self.no_decay, *(p for p, _ in self.group_lrs))

    def total_steps(self, available: int | None = None) -> int:
        """Updates of the run: `steps`, or all that `epochs` passes over the data give (`available`)."""
        total = available if self.steps is None else self.steps
        if not total:
            raise ConfigError(
                "train.steps is None and the data gives no batch of "
                f"train.global_batch={self.global_batch} rows: set train.steps, or check the data"
            )
        return total

    def warmup(self, total: int) -> int:
        """Updates of the warm-up in a run of `total`."""
        return math.ceil(total * self.warmup_ratio) if self.warmup_steps is None else self.warmup_steps


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Hyperparameters of one run of a vision-language model; the defaults are stage 2 of LLaVA-1.5.

    trainable: regular expressions over parameter paths ("llm/blocks/attn/q/kernel"); the rest is frozen.
    lora_bias: biases that train beside adapters, as peft names it: "none", "all", or "lora_only" (of adapted linears).
    decay_ratio: share of the steps in which the schedule "wsd" falls to 0.
    dtype, vision_dtype: of activations; frozen_dtype: of stored frozen parameters. loss_chunk: row slots whose logits exist at one
    time.
    """

    trainable: tuple[str, ...] = STAGE2
    lora_bias: str = "none"
    schedule: str = "cosine"
    decay_ratio: float = 0.25
    dtype: str = "bfloat16"
    vision_dtype: str = "bfloat16"
    frozen_dtype: str = "bfloat16"
    attention: str = "auto"
    remat: str = "full"
    loss_chunk: int = 512
    compat: Compat = Compat()

    def __post_init__(self):
        super().__post_init__()
        one_of("train.lora_bias", self.lora_bias, ("none", "all", "lora_only"))
        one_of("train.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        for key in ("dtype", "vision_dtype", "frozen_dtype"):
            one_of(f"train.{key}", getattr(self, key), ("float32", "bfloat16"))
        one_of("train.attention", self.attention, ATTENTIONS)
        one_of("train.remat", self.remat, REMATS)
        at_least_one("train", self, ("loss_chunk",))

    @property
    def patterns(self) -> tuple[str, ...]:
        """All regular expressions over parameter paths."""
        return (*self.trainable, *super().patterns)
