"""Numbers of a run: metrics.jsonl always, a progress bar, TensorBoard and Weights & Biases when asked for.

    {"step": 1, "lr": ..., "loss": ..., "token_accuracy": ..., "tokens": ..., "samples": ..., ...}

One JSON object per update, floats written exactly; `step` counts finished updates. The last line of each
logging window also has the speeds (tokens_per_second, tflops_per_second_per_device, mfu, data_stall), with several processes which of
them holds the others up (slowest_process, straggler), and what of the data is not trained on (unusable_samples,
samples_without_loss, cut_samples).
"""

from __future__ import annotations

import collections
import importlib.util
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vlm_jax.config import ConfigError
from vlm_jax.parallel import hosts
from vlm_jax.train.flops import Cost, peak_flops

FILE = "metrics.jsonl"
MUST_BE_FINITE = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "critic_loss": "critic's loss",
    "critic_grad_norm": "critic's gradient norm",
}
ANSWERS = ("answers", "answer_pairs", "cross_pairs")  # counts that only an encoder-decoder's step gives


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; a line that a killed process left half-written is skipped."""
    path = Path(run) / FILE
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class MetricWriter:
    """Writes a run's lines from `start_step` on, cutting off what a killed process wrote beyond it.

    Does nothing but on the first process.
    """

    def __init__(
        self,
        run: str | Path,
        start_step: int = 0,
        tensorboard: bool = False,
        wandb: bool = False,
        config: Any = None,
    ):
        self._file = self._board = self._wandb = None
        if not hosts.is_first():
            return
        run = Path(run)
        run.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(run) if line["step"] <= start_step]
        fresh = run / f"{FILE}.new"
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(fresh, run / FILE)
        self._file = open(run / FILE, "a")
        if tensorboard:
            self._board = _needed("tensorboardX", "train.tensorboard").SummaryWriter(str(run / "tensorboard"))
        if wandb:
            self._wandb = _needed("wandb", "train.wandb")
            self._wandb.init(dir=str(run), name=run.name, id=run.name, resume="allow", config=config)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it must have "step"."""
        if self._file is None:
            return
        self._file.write(json.dumps(dict(line)) + "\n")
        scalars = {key: value for key, value in line.items() if key != "step" and isinstance(value, (int, float))}
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=line["step"])

    def flush(self) -> None:
        """Hand all lines to the operating system."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flush and close everything."""
        for end in (
            self._file and self._file.close,
            self._board and self._board.close,
            self._wandb and self._wandb.finish,
        ):
            if end:
                end()


def _needed(module: str, key: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{key}=True needs the package {module}, which is not installed: install it or set {key}=False"
        )
    return importlib.import_module(module)


def line_of(step: int, rate: float, metrics: Mapping[str, np.ndarray], slots_in_all: int) -> dict[str, Any]:
    """Fetched metrics of one update (train.step) as a line; slots_in_all counts padding too."""
    m = {key: np.asarray(value) for key, value in metrics.items()}
    tokens, micro = float(m["tokens"]), m["micro_losses"].tolist()
    line = {"step": step, "lr": rate, "loss": float(m["loss"])}
    line |= {"token_accuracy": float(m["correct"]) / max(tokens, 1.0), "tokens": tokens}
    line |= {key: float(m[key]) for key in ("samples", "views", "slots", "grad_norm", "param_norm", "update_norm")}
    line["padding"] = 1 - float(m["slots"]) / slots_in_all
    return line | ({"micro_losses": micro} if len(micro) > 1 else {})


def not_finite(line: Mapping[str, Any]) -> str:
    """The losses and gradient norms of a line in words if one of them is no number, else ""."""
    checked = [(key, words) for key, words in MUST_BE_FINITE.items() if key in line]
    if all(math.isfinite(line[key]) for key, _ in checked):
        return ""
    return " and ".join(f"{words} {line[key]}" for key, words in checked)


class Speed:
    """Rates over logging windows, of real slots and FLOPs only, time spent waiting for data included."""

    def __init__(self, cost: Cost, devices: int, device_kind: str):
        self._cost, self._devices, self._peak = cost, devices, peak_flops(device_kind)
        self._rates: collections.deque[dict[str, float]] = collections.deque(maxlen=1000)

    def window(self, steps: list[Mapping[str, np.ndarray]], seconds: float, waited: float) -> dict[str, float]:
        """Rates of the fetched metrics `steps`, which took `seconds`, of which `waited` for data."""
        slots, pairs, views, samples = (
            float(sum(np.asarray(m[k]) for m in steps)) for k in ("slots", "pairs", "views", "samples")
        )
        answers = {k: float(sum(np.asarray(m[k]) for m in steps)) for k in ANSWERS if k in steps[0]}
        achieved = self._cost.total(slots, pairs, views, **answers) / seconds / self._devices
        rates = {
            "seconds_per_step": seconds / len(steps),
            "tokens_per_second": slots / seconds,
            "samples_per_second": samples / seconds,
            "views_per_second": views / seconds,
            "tflops_per_second_per_device": achieved / 1e12,
            "data_stall": waited / seconds,
        }
        if self._peak:
            rates["mfu"] = achieved / self._peak
        self._rates.append(rates)
        return rates

    def median(self) -> dict[str, float]:
        """Median of each rate over the windows after the first, which holds the warm-up."""
        return median_of(self._rates)

    def words(self, line: Mapping[str, Any]) -> str:
        """Loss and speeds of a window's last line, for the progress bar."""
        speed = f"{line['mfu']:.1%} MFU" if "mfu" in line else f"{line['tflops_per_second_per_device']:.3g} TFLOP/s"
        rate, stall = f"{line['tokens_per_second']:,.0f} tok/s", f"data stall {line['data_stall']:.0%}"
        return f"loss {line['loss']:.4f}, {rate}, {speed}, {stall}"


def straggler(own: Mapping[int, float], step: float) -> dict[str, float]:
    """The process with the most work of its own and how much of a step that is beyond the median process's.

    own: {process: seconds per step in which it does not wait for its devices}; step: seconds of a step. All processes take the same
    time for a step, as its collectives wait for the last: the slow one is known by waiting less.
    """
    if len(own) < 2:
        return {}
    slowest = max(own, key=own.__getitem__)
    return {"slowest_process": slowest, "straggler": (own[slowest] - statistics.median_low(own.values())) / step}


def slow_words(line: Mapping[str, Any]) -> str:
    """What a line says about the slowest process, for the progress bar; empty with one process."""
    return f", process {line['slowest_process']} +{line['straggler']:.0%}" if "straggler" in line else ""


def median_of(rates: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Median of each rate over the windows after the first."""
    windows = list(rates)[1:] or list(rates)
    return {key: float(np.median([w[key] for w in windows])) for key in (windows[0] if windows else ())}


class Progress:
    """A progress bar on the first process."""

    def __init__(self, total: int, start: int, shown: bool):
        self._bar = tqdm(
            total=total,
            initial=start,
            desc="train",
            unit="step",
            disable=not (shown and hosts.is_first()),
            dynamic_ncols=True,
        )

    def update(self, steps: int, words: str) -> None:
        """Advance by `steps` and show `words`."""
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(steps)

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.close()
