"""What the runs of every kind of recipe have in common: rows that they need, this process's share of them, where they export to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vlm_jax.data.pipeline import Batches
from vlm_jax.parallel import hosts
from vlm_jax.train.checkpoint import saved_data_state
from vlm_jax.train.feed import OpenBatches
from vlm_jax.train.options import RunConfig

EXPORT = "export"  # folder of a run that holds what it exports


def budget(config: RunConfig, run: Path) -> tuple[dict[str, Any] | None, dict[str, int]]:
    """(data state of the newest checkpoint, {"epochs", "least_rows"}): train.epochs passes, or as many as train.steps needs.

    A run that goes on with another train.global_batch has the steps that are done and what the remaining rows give.
    """
    state = saved_data_state(run / "checkpoints")
    done, row = (state["step"], state["row"]) if state else (0, 0)
    least = row + (config.steps - done) * config.global_batch if config.steps else 0
    return state, {"epochs": 1 if config.steps else config.epochs, "least_rows": least}


def batches_of(rows: Any, config: RunConfig, threads: int, mesh: Mesh) -> OpenBatches:
    """Batches of train.global_batch rows, of which this process loads its share."""
    index, count = hosts.data_shard(mesh)

    def batches(start: int, state: dict | None) -> Batches:
        return Batches(rows, config.global_batch, start, index, count, threads, state)

    return batches


def export_target(run: Path, status: str, instead: str) -> Path | None:
    """Where this process shall write the export of a run that ended with `status`; None where it is there, or is not its to write.

    instead: what several processes are told to do, since none of them holds all arrays.
    """
    target = run / EXPORT
    if jax.process_count() > 1:
        hosts.say(instead)
        return None
    return None if status == "already finished" and target.exists() else target
