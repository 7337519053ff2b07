"""Full training, LoRA and QLoRA of one model in one run: bytes of trainable, optimizer and base, and seconds per update.

    python launch/bench/lora.py [--width 512] [--layers 8] [--rows 4] [--slots 512] [--rank 16] [--steps 5]

Random weights and tokens, one image per row; every mode computes the same batches with the same recomputation. `activations` is
what XLA plans for temporary arrays of the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import zlib
from collections.abc import Iterator

import jax
import numpy as np

from vlm_jax.config import LLMConfig, LoRAConfig, QuantConfig, VisionConfig, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.parallel import hosts, rules
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.train import state as states
from vlm_jax.train.flops import training_cost
from vlm_jax.train.options import LORA, STAGE2, TrainConfig
from vlm_jax.train.step import batch_shardings, make_step, row_counts, split_micro_batches


def modes(model: VLMConfig, rank: int) -> Iterator[tuple[str, VLMConfig, tuple[str, ...]]]:
    """(name, model, what trains) of everything that is compared."""
    lora = dataclasses.replace(model, lora=(LoRAConfig(rank=rank, alpha=2.0 * rank, dropout=0.05),))
    yield "full", model, STAGE2
    yield "LoRA", lora, LORA
    yield "QLoRA int8", dataclasses.replace(lora, quant=QuantConfig("int8")), LORA
    yield "QLoRA nf4", dataclasses.replace(lora, quant=QuantConfig()), LORA


class Noise:
    """A checkpoint of random numbers, so that kernels are quantised while they are read; adapters start as they always do."""

    def __init__(self, model: VLMConfig):
        self._shapes = {path: like.shape for path, like in vlm.shapes(dataclasses.replace(model, quant=None)).items()}

    def __contains__(self, path: str) -> bool:
        return "/lora_" not in path

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` of a parameter."""
        shape = [len(range(*i.indices(n))) for i, n in zip(index, self._shapes[path])]
        return np.random.default_rng(zlib.crc32(path.encode())).normal(0, 0.02, shape).astype(np.float32)


def rows(model: VLMConfig, count: int, slots: int) -> dict[str, np.ndarray]:
    """A batch of random rows, an image at the beginning of each."""
    rng, features, side = np.random.default_rng(0), model.vision.features, model.vision.image_size
    at = np.broadcast_to(np.arange(slots), (count, slots)).astype(np.int32)
    shown = at < features
    return {
        "tokens": np.where(shown, 0, rng.integers(1, model.llm.vocab, at.shape)).astype(np.int32),
        "targets": rng.integers(1, model.llm.vocab, at.shape).astype(np.int32),
        "weights": (~shown).astype(np.float32),
        "image_slots": np.where(shown, at, -1).astype(np.int32),
        "positions": at,
        "segments": np.ones_like(at),
        "images": rng.integers(0, 256, (count, 1, side, side, 3), np.uint8),
    }


def size(tree: object) -> int:
    """Bytes of all arrays, as they are stored."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(model: VLMConfig, config: TrainConfig, batch: dict[str, np.ndarray], steps: int) -> dict[str, float]:
    """Bytes and seconds of one mode; the first update is not timed."""
    made = split_micro_batches(batch, 1)
    shapes = {key: x.shape for key, x in made.items()}
    state, arrays = states.create(model, config, Noise(model)), hosts.to_devices(made, batch_shardings(shapes))
    parts = {"trainable": size(state.trainable), "optimizer": size(state.opt_state), "base": size(state.frozen)}
    compiled = make_step(model, config, shapes).lower(state, arrays, np.float32(1)).compile()
    plan = compiled.memory_analysis()
    for step in range(steps + 1):
        if step == 1:
            jax.block_until_ready(state.trainable)
            began = time.perf_counter()
        state, metrics = compiled(state, arrays, np.float32(1))
    jax.block_until_ready(metrics["loss"])
    seconds = (time.perf_counter() - began) / steps
    counts = {key: float(x) for key, x in jax.jit(row_counts, static_argnums=1)(arrays, model.vision.features).items()}
    cost = training_cost(model, state.trainable).total(counts["slots"], counts["pairs"], counts["views"])
    return parts | {"activations": plan.temp_size_in_bytes, "seconds": seconds, "tflop": cost / 1e12}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 512), ("layers", 8), ("rows", 4), ("slots", 512), ("rank", 16), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    a = parser.parse_args()
    vision = VisionConfig(image_size=112, patch_size=14, width=256, layers=4, heads=4, mlp=1024)
    heads = a.width // 64
    llm = LLMConfig(a.vocab, a.width, a.width * 11 // 256 * 64, a.layers, heads, heads, 64)
    model, batch = VLMConfig(vision, llm=llm), None
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {a.rows} rows of {a.slots} slots, {a.dtype}, rank {a.rank}\n"
    )
    print("| mode | trainable MB | optimizer MB | base MB | together MB | activations MB | s per update | TFLOP |")
    print("|---|---|---|---|---|---|---|---|")
    for name, changed, trainable in modes(model, a.rank):
        batch = batch or rows(changed, a.rows, a.slots)
        config = TrainConfig(
            trainable=trainable,
            steps=1,
            global_batch=a.rows,
            dtype=a.dtype,
            vision_dtype=a.dtype,
            frozen_dtype="bfloat16",
        )
        with rules.use(make_mesh()):
            found = measure(changed, config, batch, a.steps)
        held = [found[key] for key in ("trainable", "optimizer", "base")]
        cells = [f"{x / 1e6:.1f}" for x in (*held, sum(held), found["activations"])]
        print(f"| {name} | {' | '.join(cells)} | {found['seconds']:.3f} | {found['tflop']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
