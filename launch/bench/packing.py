"""How full are rows, and how fast is the plan of an epoch: packing against what LLaVA does without it.

    python launch/bench/packing.py [--samples 665298]

The lengths imitate mix665k: its ten components with their published counts, log-normal text, 94 % of the samples with one image of 576
slots, cut to 2048; mean 892 slots, 95th percentile 1417. "Full" is the share of processed slots that hold data. Best-fit-decreasing
over the whole epoch is the yardstick: it plans sample by sample and fills rows 0.1 % better. Rows of 2048 slots cannot be fuller than
90 %, because two samples of more than 1024 slots do not share one; 4096 is the default, since 8192 gains 2 % and makes every attention
twice as long. The lines without packing are LLaVA's own batches, 8 devices with 16 samples each: every device pads to its longest
sample and waits for the slowest device.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np

from vlm_jax.data.packing import permutation, plan
from vlm_jax.data.sampler import group_by_modality_length

# (records, share with an image, median text slots, sigma of the log-normal): LLaVA dialogues, ShareGPT, VQAv2, GQA, OK-VQA, OCR-VQA,
# A-OKVQA, TextCaps, RefCOCO, Visual Genome
COMPONENTS = (
    (158_000, 1.0, 279, 0.65), (40_000, 0.0, 677, 1.0), (83_000, 1.0, 254, 0.51), (72_000, 1.0, 279, 0.51), (9_000, 1.0, 102, 0.44),
    (80_000, 1.0, 186, 0.51), (66_000, 1.0, 152, 0.58), (22_000, 1.0, 93, 0.44), (48_000, 1.0, 355, 0.58), (86_000, 1.0, 440, 0.58),
)  # fmt: skip
IMAGE_SLOTS, LONGEST = 576, 2048
ROWS = ((2048, 3), (4096, 6), (8192, 12))  # (slots, image views) of a row
DEVICES, BATCH = 8, 16


def lengths_and_views(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(slots, image views) of `samples` records drawn like mix665k."""
    rng = np.random.default_rng(0)
    counts = np.array([c[0] for c in COMPONENTS], float)
    which = rng.choice(len(COMPONENTS), samples, p=counts / counts.sum())
    table = np.array([c[1:] for c in COMPONENTS])[which]
    views = (rng.random(samples) < table[:, 0]).astype(np.int64)
    text = np.exp(rng.normal(np.log(table[:, 1]), table[:, 2])).astype(np.int64)
    return np.minimum(np.maximum(text, 1) + IMAGE_SLOTS * views, LONGEST), views


def full(lengths: np.ndarray, rows: int, row_length: int) -> float:
    """Share of the slots of `rows` rows that samples take."""
    return float(lengths.sum() / (rows * row_length))


def best_fit_decreasing(lengths: np.ndarray, views: np.ndarray, row_length: int, budget: int) -> int:
    """Rows of best-fit-decreasing over all samples: longest first, each into the row that has the least room it fits.

    Rows are alike if they have the same room, so they are counted by (slots left, views left); the slots left under which there
    is a row are the bits of one number per views left.
    """
    alike = [dict.fromkeys(range(row_length + 1), 0) for _ in range(budget + 1)]
    there, rows = [0] * (budget + 1), 0
    order = np.argsort(-lengths, kind="stable")
    for length, needs in zip(lengths[order].tolist(), views[order].tolist()):
        fits = [
            (length + _lowest(there[left] >> length), left)
            for left in range(needs, budget + 1)
            if there[left] >> length
        ]
        if fits:
            room, left = min(fits)
            alike[left][room] -= 1
            there[left] ^= (alike[left][room] == 0) << room
        else:
            room, left, rows = row_length, budget, rows + 1
        room, left = room - length, left - needs
        alike[left][room] += 1
        there[left] |= 1 << room
    return rows


def _lowest(bits: int) -> int:
    """Position of the lowest 1."""
    return (bits & -bits).bit_length() - 1


def padded(lengths: np.ndarray, order: np.ndarray) -> float:
    """Share of real slots when samples are taken in `order`, BATCH to a device, all padded to the longest of the step."""
    step = DEVICES * BATCH
    steps = lengths[order[: len(order) // step * step]].reshape(-1, step)
    return float(steps.sum() / (steps.max(axis=1) * step).sum())


def bench(samples: int) -> None:
    """Print the table."""
    lengths, views = lengths_and_views(samples)
    tail = np.percentile(lengths, 95)
    print(
        f"{samples:,} samples, {lengths.mean():.0f} slots on average, 95 % below {tail:.0f}, {views.mean():.1%} with an image\n"
    )
    print("| rows | full | seconds to plan |\n|---|---|---|")
    for row_length, budget in ROWS:
        began = time.perf_counter()
        rows = len(plan(lengths, views, row_length, budget, 0, 0))
        seconds = time.perf_counter() - began
        print(
            f"| packed, {row_length} slots and {budget} views | {full(lengths, rows, row_length):.2%} | {seconds:.1f} |"
        )
        began = time.perf_counter()
        rows = best_fit_decreasing(lengths, views, row_length, budget)
        seconds = time.perf_counter() - began
        print(
            f"| best-fit-decreasing over the epoch, {row_length} slots | {full(lengths, rows, row_length):.2%} | {seconds:.1f} |"
        )
    words = np.where(views > 0, lengths - IMAGE_SLOTS * views, -lengths)
    streams = iter(range(3))
    began = time.perf_counter()
    order = group_by_modality_length(
        words.tolist(), BATCH, DEVICES, lambda n: permutation(n, 0, 0, next(streams)).tolist()
    )
    seconds = time.perf_counter() - began
    print(
        f"| one sample a row, padded to the longest, group_by_modality_length | {padded(lengths, np.array(order)):.2%} | {seconds:.1f} |"
    )
    print(
        f"| one sample a row, padded to the longest, shuffled | {padded(lengths, permutation(samples, 0, 0)):.2%} | |"
    )
    print(f"| one sample a row, padded to {LONGEST} | {full(lengths, samples, LONGEST):.2%} | |")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 30 if sys.platform == "darwin" else 1 << 20)
    print(f"\n{most:.2f} GiB of memory at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=665_298)
    bench(parser.parse_args().samples)
