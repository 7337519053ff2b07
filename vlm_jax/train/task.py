"""What differs between runs of the one training loop: the task of a run, and how a vision-language model is one.

    create / abstract -> state        given(update) -> scheduled numbers        step(state, batch, given) -> (state, results)
                                                                                line(results) -> metrics.jsonl, rates -> speeds
Everything else, the order of batches, checkpoints, resume, logs and stopping, is the loop's and the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from vlm_jax.config import VLMConfig, to_dict
from vlm_jax.models import vlm
from vlm_jax.train import metrics, optimizer
from vlm_jax.train import state as states
from vlm_jax.train.flops import training_cost
from vlm_jax.train.options import RunConfig, TrainConfig
from vlm_jax.train.state import LeafSource, TrainState
from vlm_jax.train.step import BATCH_AXES, Axes, make_step

Shapes = Mapping[str, tuple[int, ...]]  # of a batch's arrays [A, B, ...]
Given = Any  # tree of floats


class Rates(Protocol):
    """Speeds over logging windows."""

    def window(self, steps: list[Mapping[str, np.ndarray]], seconds: float, waited: float) -> dict[str, Any]:
        """What the last line of a window says of the fetched results `steps`, which took `seconds`, of which `waited` for data."""

    def median(self) -> dict[str, float]:
        """Medians over the windows after the first."""

    def words(self, line: Mapping[str, Any]) -> str:
        """The progress bar's text for the last line of a window."""


class Task(Protocol):
    """See the module. axes: logical axes of a batch's arrays behind the accumulation axis; other keys of a batch are not
    read. unit: what a batch is made of, in words.
    """

    config: RunConfig
    axes: Axes
    unit: str

    def saved_config(self) -> dict[str, Any]:
        """What is stored beside the checkpoints unless the caller gives more (JSON)."""

    def abstract(self) -> TrainState:
        """Shapes, dtypes and (under a mesh) shardings of the state."""

    def create(self) -> TrainState:
        """The state at step 0."""

    def step(self, shapes: Shapes) -> Any:
        """The jitted (state, batch, given) -> (state, results), results with "loss"; the state is donated."""

    def given(self, update: int, total: int) -> Given:
        """Scheduled numbers of update 0, 1 ... total - 1, floats that the step gets as float32."""

    def line(self, step: int, given: Given, results: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, Any]:
        """The line of metrics.jsonl of a finished update."""

    def rates(self, state: TrainState, shapes: Shapes) -> Rates:
        """What measures speeds."""

    def size(self, state: TrainState) -> str:
        """How many parameters are trained and frozen, in words."""


@dataclasses.dataclass(frozen=True)
class VLMTask:
    """A vision-language model learns to answer; source: initial weights (default: random)."""

    config: TrainConfig
    model: VLMConfig
    source: LeafSource | None = None
    axes = BATCH_AXES
    unit = "rows"

    def saved_config(self) -> dict[str, Any]:
        """Model and hyperparameters."""
        return {"model": to_dict(self.model), "train": to_dict(self.config)}

    def abstract(self) -> TrainState:
        """See state.abstract."""
        return states.abstract(self.model, self.config)

    def create(self) -> TrainState:
        """See state.create."""
        return states.create(self.model, self.config, self.source)

    def step(self, shapes: Shapes) -> Any:
        """See step.make_step."""
        return make_step(self.model, self.config, shapes)

    def given(self, update: int, total: int) -> float:
        """What multiplies the learning rates."""
        return optimizer.rate_factor(self.config, update, total)

    def line(self, step: int, given: float, results: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, Any]:
        """See metrics.line_of."""
        return metrics.line_of(step, self.config.lr * given, results, int(np.prod(shapes["tokens"])))

    def rates(self, state: TrainState, shapes: Shapes) -> metrics.Speed:
        """Tokens, samples and FLOPs per second."""
        cost = training_cost(self.model, state.trainable, "features" in shapes)
        return metrics.Speed(cost, jax.device_count(), jax.devices()[0].device_kind)

    def size(self, state: TrainState) -> str:
        """Weights, however they are stored."""
        trained = sum(x.size for x in state.trainable.values())
        frozen = vlm.count(dataclasses.replace(self.model, quant=None)) - trained
        return f"{trained:,} parameters trained, {frozen:,} frozen"
