"""Our side of train.py: the step, the rows and the reader of real training, asked from outside (see referee).

python launch/bench/train_ours.py FOLDER CORES
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from referee import Clock, keep_programs, serve, take_cores
from stream import IMAGE_TOKEN, Case

take_cores(int(sys.argv[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from vlm_jax.config import LoRAConfig  # noqa: E402
from vlm_jax.convert.write import export  # noqa: E402
from vlm_jax.convert.write_adapter import export_adapter  # noqa: E402
from vlm_jax.data.pipeline import Packing, Rows  # noqa: E402
from vlm_jax.models import vlm  # noqa: E402
from vlm_jax.parallel import rules  # noqa: E402
from vlm_jax.parallel.mesh import make_mesh  # noqa: E402
from vlm_jax.train import state as states  # noqa: E402
from vlm_jax.train.feed import Feed  # noqa: E402
from vlm_jax.train.flops import peak_flops, training_cost  # noqa: E402
from vlm_jax.train.options import LORA, STAGE2, TrainConfig  # noqa: E402
from vlm_jax.train.runs import batches_of  # noqa: E402
from vlm_jax.train.step import make_step  # noqa: E402

RATE = 1e-5


class Ours:
    """Orders: write, plan, prepare, run."""

    def __init__(self, folder: Path):
        self.folder, self.case = folder, Case(**json.loads((folder / "case.json").read_text()))
        c, model = self.case, self.case.shape.model
        lora = (LoRAConfig(rank=c.rank, alpha=2.0 * c.rank),) if c.mode == "lora" else ()
        self.model = dataclasses.replace(model, lora=lora)
        keep_programs(folder)
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.state = self.update = None

    def config(self, rows: int, micro: int, **how: Any) -> TrainConfig:
        """The recipe's: micro rows at a time."""
        c = self.case
        if rows % micro:
            raise ValueError(f"{rows} rows are not a multiple of {micro}")
        return TrainConfig(
            trainable=LORA if c.mode == "lora" else STAGE2, steps=c.updates, global_batch=rows, accum=rows // micro, lr=RATE,
            dtype=c.dtype, vision_dtype=c.dtype, frozen_dtype=c.dtype, **how,
        )  # fmt: skip

    def write(self) -> dict[str, Any]:
        """Export the weights for the other side."""
        with rules.use(self.mesh):
            params = states.create(self.model, self.config(1, 1)).params
        short = {"float32": "f32", "bfloat16": "bf16"}[self.case.dtype]
        whole = {path: x for path, x in params.items() if "/lora_" not in path}
        export(
            self.folder / "model", dataclasses.replace(self.model, lora=()), whole, dtype=short, image_token=IMAGE_TOKEN
        )
        if self.model.lora:
            trained = {path: None for path in params if path.startswith("projector/")}
            export_adapter(self.folder / "adapter", self.model, params, trained=trained, base=self.folder / "model")
        device = jax.devices()[0].device_kind
        text = f"jax {jax.__version__} on {device}, {vlm.count(self.model) / 1e6:.0f} M parameters"
        return {"text": text, "peak": peak_flops(device) if jax.default_backend() != "cpu" else None}

    def rows(self, kind: str) -> tuple[Rows, int]:
        """(rows, how many make an update)"""
        c, size = self.case, self.case.shape
        samples = c.samples_of(kind, self.folder)
        slots, views = (c.equal, 1) if kind == "equal" else (size.slots, size.views)
        made = Rows(range(len(samples)), lambda i: samples[i].sample(), self.model, Packing(slots, views))
        return made, c.rows * size.slots // slots

    def plan(self, kind: str) -> dict[str, Any]:
        """{"updates": samples of every update; "slots": real slots in all; "full": their share; "flops": model FLOPs in all}"""
        rows, group = self.rows(kind)
        updates = [
            [int(i) for row in range(u * group, (u + 1) * group) for i in rows.records_of(row)]
            for u in range(self.case.updates)
        ]
        lengths = [int(rows.manifest.lengths[i]) for update in updates for i in update]
        views = int(sum(rows.manifest.views[i] for update in updates for i in update))
        trained = states.chosen(self.model, self.config(1, 1))
        flops = training_cost(self.model, trained).total(sum(lengths), sum(n * n / 2 for n in lengths), views)
        full = sum(lengths) / (self.case.updates * group * rows.shape.slots)
        return {"updates": updates, "slots": sum(lengths), "full": full, "flops": flops, "rows": group}

    def prepare(self, kind: str, way: dict[str, Any]) -> dict[str, Any]:
        """Compile for a way, {"micro": rows at a time, and keys of TrainConfig}; the first update, from fresh weights."""
        self.state = self.update = None
        self._rows, group = self.rows(kind)
        way = {"micro": min(way.get("micro", group), group)} | {k: v for k, v in way.items() if k != "micro"}
        self._config, clock = self.config(group, **way), Clock()
        with rules.use(self.mesh):
            feed = self._feed()
            self.batches = [next(feed).arrays for _ in range(self.case.updates)]
            feed.close()
            state = states.create(self.model, self._config)
            compiled = make_step(self.model, self._config, feed.shapes).lower(state, self.batches[0], np.float32(1))
            self.update = compiled.compile()
            took = clock.read()["seconds"]
            self.state, metrics = self.update(state, self.batches[0], np.float32(1))
        first = {key: float(metrics[key]) for key in ("loss", "grad_norm")}
        return first | {"compile_seconds": took}

    def run(self, loading: bool) -> dict[str, float]:
        """All updates once; loading: images are read, from the files, while it trains."""
        with rules.use(self.mesh):
            clock = Clock()
            feed = self._feed() if loading else None
            for update in range(self.case.updates):
                arrays = next(feed).arrays if loading else self.batches[update]
                self.state, metrics = self.update(self.state, arrays, np.float32(1))
            loss = float(metrics["loss"])
            took = clock.read()
            if loading:
                feed.close()
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        return took | {"loss": loss, "memory": memory}

    def _feed(self) -> Feed:
        batches = batches_of(self._rows, self._config, self.case.threads, self.mesh)
        return Feed(batches, 0, None, self._config.accum)


if __name__ == "__main__":
    ours = Ours(Path(sys.argv[1]))
    serve({name: getattr(ours, name) for name in ("write", "plan", "prepare", "run")})
