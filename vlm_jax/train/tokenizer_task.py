"""A visual tokenizer as a task of the training loop: its state, step, schedules, lines of metrics and speeds.

    {"step", "lr", "loss", "reconstruction", "perceptual", "psnr", "adversarial", "balance", "critic_loss", "codes_used", "perplexity", ...}

codes_used is the share of a codebook that a batch used, perplexity exp of the entropy of its histogram; where a tokenizer has several
codebooks their names stand in front. The last line of a logging window has both for all its images (window/codes_used ...).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.config import to_dict
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train import tokenizer_state as states
from vlm_jax.train.metrics import median_of
from vlm_jax.train.state import TrainState
from vlm_jax.train.step import Step
from vlm_jax.train.task import Shapes
from vlm_jax.train.tokenizer_options import TokenizerTrainConfig, ramp, rate_factor
from vlm_jax.train.tokenizer_step import IMAGE_AXES, USAGE, make_step

PEAK = 4.0  # square of the range -1..1
OF_CRITIC = ("adversarial", "balance", "fake_logits")  # results of the generator's loss that need a critic


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """A recipe with what it needs beside images.

    seen: arrays of the perceptual loss (perceptual.read_lpips), {} for none. table [V, D]: token embeddings of a language-driven
    codebook. start: leaves tokenizer/... and codebooks/... that replace random ones.
    """

    recipe: TokenizerRecipe
    seen: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    table: np.ndarray | None = None
    start: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    axes = IMAGE_AXES
    unit = "images"

    @property
    def config(self) -> TokenizerTrainConfig:
        """The hyperparameters."""
        return self.recipe.train

    def saved_config(self) -> dict[str, Any]:
        """The whole recipe."""
        return to_dict(self.recipe)

    def abstract(self) -> TrainState:
        """See tokenizer_state.abstract."""
        return states.abstract(self.recipe, self.seen)

    def create(self) -> TrainState:
        """See tokenizer_state.create."""
        return states.create(self.recipe, self.seen, self.table, self.start)

    def step(self, shapes: Shapes) -> Step:
        """See tokenizer_step.make_step."""
        return make_step(self.recipe, self.seen, shapes)

    def given(self, update: int, total: int) -> dict[str, float]:
        """rate: factor of the learning rates; ratio, ratio_after: how far the codebook is drawn to the language model's.

        UniCode's program counts the steps of both optimizers, so its second pass is half an update further.
        """
        ends = ramp(self.config, total) if self.recipe.tokenizer.quantizer.language else math.inf
        ratios = {"ratio": min(1.0, update / ends), "ratio_after": min(1.0, (update + 0.5) / ends)}
        return {"rate": rate_factor(self.config, update, total), **ratios}

    def line(
        self, step: int, given: Mapping[str, float], results: Mapping[str, np.ndarray], shapes: Shapes
    ) -> dict[str, Any]:
        """Losses, norms, what the codebooks say of themselves, and how much of them the batch used."""
        critic = self.recipe.critic.kind != "none"
        line = {"step": step, "lr": self.config.lr * given["rate"]}
        for key, value in results.items():
            if not key.startswith(USAGE) and key != "squared_error" and (critic or key not in OF_CRITIC):
                line[key] = float(value)
        line["psnr"] = 10 * math.log10(PEAK / max(float(results["squared_error"]), 1e-12))
        if self.recipe.tokenizer.quantizer.language:
            line["ratio"] = given["ratio"]
        return line | {"images": shapes["images"][1]} | usage_of([results])

    def rates(self, state: TrainState, shapes: Shapes) -> ImageRates:
        """Images per second and code usage."""
        return ImageRates(shapes["images"][1])

    def size(self, state: TrainState) -> str:
        """Parameters of both networks, and of the perceptual loss with token embeddings."""
        counts = [
            sum(x.size for x in leaves.values())
            for leaves in (states.network(state.trainable, False), states.network(state.trainable, True), state.frozen)
        ]
        return "{:,} parameters of the tokenizer and {:,} of its critic trained, {:,} frozen".format(*counts)


def usage_of(steps: list[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """{"codes_used", "perplexity"} of the histograms of all `steps` together, by book where there are several."""
    books = [key for key in steps[0] if key.startswith(USAGE)]
    found = {}
    for key in books:
        counts = sum(np.asarray(results[key], np.float64) for results in steps)
        share = counts[counts > 0] / counts.sum()
        name = f"{key.removeprefix(USAGE)}/" if len(books) > 1 else ""
        found[f"{name}codes_used"] = float((counts > 0).mean())
        found[f"{name}perplexity"] = float(np.exp(-(share * np.log(share)).sum()))
    return found


class ImageRates:
    """Rates over logging windows, time spent waiting for data included, and the usage of codes in the window."""

    def __init__(self, images: int):
        self._images = images
        self._rates: collections.deque[dict[str, float]] = collections.deque(maxlen=1000)

    def window(self, steps: list[Mapping[str, np.ndarray]], seconds: float, waited: float) -> dict[str, float]:
        """See task.Rates."""
        rates = {
            "seconds_per_step": seconds / len(steps),
            "images_per_second": self._images * len(steps) / seconds,
            "data_stall": waited / seconds,
        }
        self._rates.append(rates)
        return rates | {f"window/{key}": value for key, value in usage_of(steps).items()}

    def median(self) -> dict[str, float]:
        """Median of each rate over the windows after the first, which holds the warm-up."""
        return median_of(self._rates)

    def words(self, line: Mapping[str, Any]) -> str:
        """For the progress bar."""
        rate, stall = f"{line['images_per_second']:,.1f} images/s", f"data stall {line['data_stall']:.0%}"
        return f"loss {line['loss']:.4f}, psnr {line['psnr']:.1f}, {rate}, {stall}"
