"""How fast is the data path on this machine: planning an epoch, and images per CPU second.

    python launch/bench/data.py [--samples 665000] [--images 200]
The lengths imitate LLaVA's mix665k (ten components with its published counts, log-normal text, 94 % with an image of 576 slots); the
images are 640 x 480 JPEGs of noise, which decode slower than photographs of that size.
"""

from __future__ import annotations

import argparse
import io
import time

import numpy as np
from PIL import Image

from vlm_jax.config import VLMConfig
from vlm_jax.data.images import ImageSource, Preprocess, load_views
from vlm_jax.data.packing import plan

# (records, share with an image, median text slots, sigma of the log-normal), after the composition of mix665k
COMPONENTS = (
    (158_000, 1.0, 330, 0.45), (40_000, 0.0, 800, 0.7), (83_000, 1.0, 300, 0.35), (72_000, 1.0, 330, 0.35), (9_000, 1.0, 120, 0.3),
    (80_000, 1.0, 220, 0.35), (66_000, 1.0, 180, 0.4), (22_000, 1.0, 110, 0.3), (48_000, 1.0, 420, 0.4), (86_000, 1.0, 520, 0.4),
)  # fmt: skip


def lengths_and_views(samples: int, limit: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """(slots, image views) of `samples` records drawn like mix665k."""
    rng = np.random.default_rng(0)
    counts = np.array([c[0] for c in COMPONENTS], float)
    which = rng.choice(len(COMPONENTS), samples, p=counts / counts.sum())
    table = np.array([c[1:] for c in COMPONENTS])[which]
    views = (rng.random(samples) < table[:, 0]).astype(np.int64)
    text = np.exp(rng.normal(np.log(table[:, 1]), table[:, 2])).astype(np.int64)
    return np.minimum(text + 576 * views, limit), views


def bench_plan(samples: int) -> None:
    """Seconds to plan an epoch, and how full its rows are."""
    lengths, views = lengths_and_views(samples)
    print(
        f"{samples} samples, mean {lengths.mean():.0f} slots\n\n"
        "| row length | views per row | seconds | rows | full |\n|---|---|---|---|---|"
    )
    for row_length, budget in ((2048, 3), (4096, 6), (8192, 12)):
        began = time.perf_counter()
        made = plan(lengths, views, row_length, budget, 0, 0)
        seconds = time.perf_counter() - began
        print(
            f"| {row_length} | {budget} | {seconds:.2f} | {len(made)} | {lengths.sum() / (len(made) * row_length):.1%} |"
        )


def bench_images(count: int) -> None:
    """Images per CPU second: JPEG bytes to uint8 views of 336 pixels."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (480, 640, 3), np.uint8)).save(buffer, "JPEG", quality=90)
    source = ImageSource("noise.jpg", data=buffer.getvalue())
    print(
        f"\n{count} JPEGs of 640 x 480, {len(buffer.getvalue()) / 1000:.0f} kB\n\n| mode | images per CPU second |\n|---|---|"
    )
    for aspect in ("square", "pad"):
        how = Preprocess.of(VLMConfig(aspect=aspect))
        began = time.process_time()
        for _ in range(count):
            load_views(source, how)
        print(f"| {aspect} | {count / (time.process_time() - began):.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=665_000)
    parser.add_argument("--images", type=int, default=200)
    chosen = parser.parse_args()
    bench_plan(chosen.samples)
    bench_images(chosen.images)
