"""Checkpoints of a run: Orbax underneath, our layout and our sentences on top.

    checkpoints/base/            frozen parameters, written once per run
    checkpoints/<step>/params    trainable parameters
    checkpoints/<step>/optimizer moments
    checkpoints/<step>/moving    codebooks, averages and statistics of a visual tokenizer
    checkpoints/<step>/meta      JSON: step, rng, data state, config, {path: [shape, dtype]} of all parameters

A step directory appears only when it is complete, and an old one goes only after that, so a process killed
at any moment, or a full disk, costs at most what was trained since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vlm_jax.config import UserError
from vlm_jax.nn.params import Params
from vlm_jax.train.state import TrainState

Leaves = dict[str, list]
ITEMS = ("params", "optimizer", "moving", "meta")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or does not fit; the message names the folder and what to do."""


def saved_data_state(folder: str | Path) -> dict[str, Any] | None:
    """The data state of the newest complete checkpoint, None if there is none: read before the data is opened."""
    steps = [path for path in Path(folder).glob("*/_CHECKPOINT_METADATA") if path.parent.name.isdigit()]
    if not steps:
        return None
    newest = max(steps, key=lambda path: int(path.parent.name)).parent
    return json.loads((newest / "meta" / "metadata").read_text())["data"]


def leaves_of(params: Mapping[str, Any]) -> Leaves:
    """{path: [shape, dtype]}: what two states must share to be of the same model."""
    return {path: [list(x.shape), str(jnp.dtype(x.dtype))] for path, x in sorted(params.items())}


class Checkpointer:
    """Saves and restores train states under `folder`, keeping the last `keep`."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._keep = keep
        # old steps are removed here and not by Orbax, which can remove them although the new one failed
        options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=True)
        self._steps = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._steps.latest_step()

    def save(self, step: int, state: TrainState, data: Mapping[str, Any] | None, config: Mapping[str, Any]) -> None:
        """Start writing and return as soon as the arrays are copied; raises if the save before failed."""
        rng = np.asarray(jax.device_get(state.rng)).tolist()
        meta = {"step": step, "rng": rng, "data": data, "config": config}
        meta |= {"trainable": leaves_of(state.trainable), "frozen": leaves_of(state.frozen)}
        meta |= {"moving": leaves_of(state.moving)} if state.moving else {}
        self.wait()
        with self._reporting(step):
            self._save_base(state.frozen)
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(state.trainable),
                optimizer=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(meta),
                **({"moving": ocp.args.StandardSave(state.moving)} if state.moving else {}),
            )
            self._steps.save(step, args=items)

    def wait(self) -> None:
        """Return when everything is on disk and old steps are gone; CheckpointError if that failed."""
        with self._reporting(None):
            self._steps.wait_until_finished()
            self._steps.check_for_errors()
            for step in self._complete()[: -self._keep]:
                self._steps.delete(step)

    def close(self) -> None:
        """Wait and release the background threads."""
        self.wait()
        self._steps.close()

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON part of a checkpoint (default: the newest)."""
        step = self._existing(step)
        return self._steps.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, goal: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """(state, meta) laid out like `goal` (state.abstract), on whatever mesh that names."""
        step, meta = self._existing(step), self.meta(step)
        goal = jax.tree.map(_with_sharding, goal)
        for part in ("trainable", "frozen", "moving"):
            self._same_leaves(meta.get(part, {}), leaves_of(getattr(goal, part)), part)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(goal.trainable),
            optimizer=ocp.args.StandardRestore(goal.opt_state),
            **({"moving": ocp.args.StandardRestore(goal.moving)} if goal.moving else {}),
        )
        read = self._steps.restore(step, args=items)
        frozen = self._read_base(goal.frozen)

        def place(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.make_array_from_callback(like.shape, like.sharding, np.asarray(value, like.dtype).__getitem__)

        step, rng = place(step, goal.step), place(meta["rng"], goal.rng)
        moving = read["moving"] if goal.moving else {}
        return TrainState(step, read["params"], frozen, read["optimizer"], rng, moving), meta

    def params(
        self, shardings: Mapping[str, Any] | None = None, step: int | None = None
    ) -> tuple[Params, dict[str, Any]]:
        """(all parameters {path: array}, meta), without optimizer: for evaluation, generation and export.

        shardings: where each goes, default: the first device.
        """
        step, meta = self._existing(step), self.meta(step)

        def goal(leaves: Leaves) -> dict[str, jax.ShapeDtypeStruct]:
            where = shardings or {}
            shapes = {
                p: jax.ShapeDtypeStruct(tuple(n), dtype, sharding=where.get(p)) for p, (n, dtype) in leaves.items()
            }
            return {path: _with_sharding(s) for path, s in shapes.items()}

        read = self._steps.restore(
            step, args=ocp.args.Composite(params=ocp.args.StandardRestore(goal(meta["trainable"])))
        )
        return {**self._read_base(goal(meta["frozen"])), **read["params"]}, meta

    def _existing(self, step: int | None) -> int:
        found = self.latest() if step is None else step
        if found is None or found not in self._steps.all_steps():
            wanted = "" if step is None else f" of step {step}"
            raise CheckpointError(f"{self.folder} holds no checkpoint{wanted}: check the path of the run")
        return found

    def _same_leaves(self, saved: Leaves, wanted: Leaves, part: str) -> None:
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                there, here = (_describe(leaves.get(path)) for leaves in (saved, wanted))
                raise CheckpointError(
                    f"the checkpoint in {self.folder} is of another model or recipe: its {part} parameter "
                    f"{path} is {there}, this config's is {here}; use the config beside it or another folder"
                )

    def _save_base(self, frozen: Params) -> None:
        if frozen and not (self.folder / "base").exists():
            with ocp.StandardCheckpointer() as writer:
                writer.save(self.folder / "base", frozen)

    def _read_base(self, goal: dict[str, jax.ShapeDtypeStruct]) -> Params:
        if not goal:
            return {}
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(self.folder / "base", goal)

    @contextlib.contextmanager
    def _reporting(self, step: int | None) -> Iterator[None]:
        """Anything that goes wrong while writing becomes one sentence that names what is still there."""
        try:
            yield
        except Exception as error:
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            kept = self._complete()
            intact = f"the checkpoint of step {kept[-1]} is intact" if kept else "no checkpoint had been written before"
            free = shutil.disk_usage(self.folder).free / 2**30
            cause = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{what} could not be written to {self.folder} ({free:.1f} GiB free there): {cause}; "
                f"{intact}: make room and start the same command again"
            ) from error

    def _complete(self) -> list[int]:
        """Steps that are complete on disk, read afresh."""
        return sorted(
            int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()
        )


def _describe(leaf: list | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}[{', '.join(map(str, leaf[0]))}]"


def _with_sharding(goal: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Without a mesh arrays go to the first device, wherever they were when they were saved."""
    where = goal.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(goal.shape, goal.dtype, sharding=where)
