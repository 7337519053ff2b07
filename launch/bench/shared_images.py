"""One image encoded once with all its questions, against once for every question: FLOPs of tower and projector, and seconds per epoch.

    python launch/bench/shared_images.py [--images 16] [--questions 5] [--repeats 2]

Random weights, generated watches with five questions each, flattened into one sample per question as CLIP-FlanT5 trains on; the tower
is frozen, projector and T5 are trained. Both lines are gradients of the same samples in the same run, and their loss is the same. What
the encoder makes of an image depends on the question and is computed for every one: only tower and projector are shared. The second
table is counted, not run: what the same k means at published sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from vlm_jax.config import T5Config, VisionConfig, VLMConfig
from vlm_jax.data.dataset import open_rows
from vlm_jax.data.generated import make_watch_data
from vlm_jax.data.options import DataConfig, Source
from vlm_jax.data.packing import batch_rows
from vlm_jax.data.pipeline import Rows
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.models import vlm
from vlm_jax.train import state as states
from vlm_jax.train.flops import causal_pairs, training_cost
from vlm_jax.train.options import STAGE2, TrainConfig
from vlm_jax.train.step import loss_and_gradients, row_counts, split_micro_batches

MODEL = VLMConfig(
    VisionConfig(image_size=112, patch_size=14, width=192, layers=6, heads=4, mlp=768),
    llm=T5Config(vocab=512, width=128, mlp=256, encoder_layers=2, decoder_layers=2, heads=4, head_dim=32),
)
TRAIN = TrainConfig(trainable=STAGE2, steps=1, dtype="float32", vision_dtype="float32", remat="none", loss_chunk=64)
SLOTS, APART, TOGETHER = 640, 6, 2  # of a row: slots; views where every sample has its own; views where they share
BATCH = 4
SIZES = {"XL": T5Config(), "XXL": T5Config(width=4096, mlp=10240, heads=64)}
QUESTION, ANSWER = 64, 8  # text slots and answer slots of a sample of the flattened mix665k, about


def open_data(folder: Path, images: int) -> tuple[DataConfig, Path]:
    """Watches with their dialogues, each question a sample of its own."""
    data = DataConfig(
        template="t5_v1", generated_watches=images, generated_task="rounds", row_length=SLOTS, sample_length=SLOTS,
        answer_length=256, max_bad_share=0.0, threads=2,
    )  # fmt: skip
    path = make_watch_data(folder, data, MODEL.llm.vocab)
    sources = {"watches": Source(str(path), flatten="pairs")}
    return dataclasses.replace(data, generated_watches=0, sources=sources, image_folder=str(folder / "images")), folder


def batches(rows: Rows) -> list[dict[str, np.ndarray]]:
    """All rows of an epoch, BATCH at a time; the last are filled up with padding."""
    made = [rows[r] for r in range(-(-len(rows) // BATCH) * BATCH)]
    return [split_micro_batches(batch_rows(made[i : i + BATCH]), 1) for i in range(0, len(made), BATCH)]


class Epoch:
    """The gradients of all batches of a mode; compiled beforehand, and timed by one pass after another."""

    def __init__(self, made: list[dict[str, np.ndarray]], params: dict):
        chosen = states.select(TRAIN.trainable, params)
        self.params = tuple({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))
        self.batches = [{key: jax.device_put(x) for key, x in batch.items()} for batch in made]
        step = jax.jit(functools.partial(loss_and_gradients, MODEL, TRAIN))
        self.run = step.lower(*self.params, self.batches[0]).compile()
        self.seconds, self.cpu_seconds = np.inf, np.inf

    def __call__(self) -> None:
        """One pass; the fastest counts."""
        began, cpu, self.sums = time.perf_counter(), time.process_time(), []
        for batch in self.batches:
            self.sums.append(jax.block_until_ready(self.run(*self.params, batch))[1])
        self.seconds = min(self.seconds, time.perf_counter() - began)
        self.cpu_seconds = min(self.cpu_seconds, time.process_time() - cpu)

    @property
    def loss(self) -> float:
        """Mean over all supervised tokens."""
        tokens = [float(found["tokens"]) for found in self.sums]
        return sum(float(found["loss"]) * n for found, n in zip(self.sums, tokens)) / sum(tokens)

    @property
    def encoded(self) -> int:
        """Views that a row shows; one device encodes no others (but those that fill a group of two)."""
        return round(sum(float(row_counts(batch, MODEL.vision.features)["views"]) for batch in self.batches))


def saved(size: str, questions: int) -> tuple[float, float]:
    """(share of tower and projector in the FLOPs of stage 2 of CLIP-FlanT5 apart, share of all FLOPs that sharing saves)."""
    model = VLMConfig(llm=SIZES[size])
    cost = training_cost(model, [p for p in vlm.shapes(model) if p.startswith(("llm/", "projector/"))])
    slots = model.vision.features + QUESTION
    text = cost.total(slots, causal_pairs([slots]), 0, ANSWER, causal_pairs([ANSWER]), ANSWER * slots)
    return cost.view / (cost.view + text), cost.view * (1 - 1 / questions) / (cost.view + text)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 16), ("questions", 5), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    params = vlm.init(MODEL, 0)
    view = training_cost(MODEL, states.select(TRAIN.trainable, params)).view
    with tempfile.TemporaryDirectory() as folder:
        data, where = open_data(Path(folder), a.images)
        tokenizer, rows, modes = load_tokenizer(where), {}, {}
        for shared, views in ((False, APART), (True, TOGETHER)):
            how = dataclasses.replace(data, shared_images=shared, views_per_row=views)
            rows[shared] = open_rows(how, MODEL, tokenizer, cache=where / "cache")
            modes[shared] = Epoch(batches(rows[shared]), params)
        for _ in range(a.repeats):  # in turn, so that other work of the machine meets both
            for mode in modes.values():
                mode()
    samples = len(rows[True].manifest.usable)
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {a.images} images, {samples} samples, rows of {SLOTS} slots\n"
    )
    print("| images | rows | views encoded | tower and projector GFLOP | s per epoch | CPU s | loss |\n|" + "---|" * 7)
    for shared, mode in modes.items():
        name = f"shared, {TOGETHER} views a row" if shared else f"apart, {APART} views a row"
        flops, times = mode.encoded * view / 1e9, f"{mode.seconds:.2f} | {mode.cpu_seconds:.2f}"
        print(f"| {name} | {len(rows[shared])} | {mode.encoded} | {flops:.1f} | {times} | {mode.loss:.6f} |")
    apart, together = modes[False], modes[True]
    print(
        f"\n{apart.encoded / together.encoded:.2f} times fewer FLOPs of tower and projector, "
        f"{apart.seconds / together.seconds:.2f} times fewer seconds, {apart.cpu_seconds / together.cpu_seconds:.2f} of CPU\n"
    )
    print(
        f"| stage 2 of CLIP-FlanT5, {a.questions} questions an image | tower and projector are | saved of all FLOPs |\n|---|---|---|"
    )
    for size in SIZES:
        print("| {} | {:.1%} | {:.1%} |".format(size, *saved(size, a.questions)))


if __name__ == "__main__":
    main()
