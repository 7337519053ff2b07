"""How fast images become batches: this program against torch DataLoader + transformers' CLIPImageProcessor, in one run.

    python launch/bench/images.py [--images 200] [--rounds 3] [--threads 2,4] [--workers 2,4]      (extra `parity`)

Both read the same JPEGs (640 x 480, quality 90, made like photographs: smooth colours and fine texture) on the same cores and take
turns, round by round. The peer is LLaVA's own way: PIL, `expand2square` under pad, the processor, a collate into one float32 tensor,
in worker processes that are warm. Ours is Rows and Batches as training uses them, which hand out uint8 and leave the normalisation to
the device; the line "float32 on the host" adds it in the reader threads. Each side runs with every number of workers or threads and
its best round counts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from vlm_jax.config import IGNORE, IMAGE, VLMConfig
from vlm_jax.data.image_cache import Views, cache_bytes
from vlm_jax.data.images import Preprocess
from vlm_jax.data.pipeline import Batches, Packing, Rows
from vlm_jax.data.tasks import Sample

BATCH = 16  # samples per batch of the peer
TEXT = 60  # tokens of a sample of ours, beside its image


def photograph(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG with the smooth colours and the fine texture of a photograph, about as large as one."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = (rng.normal(0, 8, (height // 2, width // 2)) + 128).clip(0, 255).astype(np.uint8)
    fine = np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BILINEAR), np.float32) - 128
    buffer = io.BytesIO()
    Image.fromarray((smooth + fine[..., None]).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def peer(paths: list[str], aspect: str, workers: int) -> Callable[[], Iterator[int]]:
    """An epoch of LLaVA's pipeline as an iterator of images per batch; its workers live on between epochs."""
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    colour = tuple(int(255 * x) for x in processor.image_mean)

    class Photographs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int):
            image = Image.open(paths[index]).convert("RGB")
            if aspect == "pad" and image.width != image.height:
                side = max(image.size)
                canvas = Image.new("RGB", (side, side), colour)
                canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
                image = canvas
            return processor(image, return_tensors="pt")["pixel_values"][0]

    loader = torch.utils.data.DataLoader(
        Photographs(), BATCH, num_workers=workers, persistent_workers=True, collate_fn=torch.stack
    )
    return lambda: (len(batch) for batch in loader)


def ours(
    paths: list[str], aspect: str, threads: int, folder: str | None = None, floats: bool = False
) -> Callable[[], Iterator[int]]:
    """An epoch of Rows and Batches as an iterator of images per batch. folder: of resized images; floats: normalise on the host."""
    config = VLMConfig(aspect=aspect)
    tokens = np.array([1, IMAGE, *range(2, TEXT)], np.int32)
    labels = np.where(tokens == IMAGE, IGNORE, tokens)
    load = Views(Preprocess.of(config), folder)
    if floats:
        load = Normalised(load)
    how = Packing(row_length=2048, view_budget=3)
    rows = Rows(paths, lambda path: Sample(tokens, labels, (path,)), config, how, threads=threads, load=load)
    return lambda: (
        int((batch["segments"].max(1)).sum()) for _, batch in Batches(rows, BATCH // 3, num_threads=threads)
    )


class Normalised:
    """Views as the float32 that the tower sees, made on the host."""

    def __init__(self, views: Views):
        self.views, self.key, self.view_shape, self.dtype = views, views.key, views.view_shape, np.dtype(np.float32)

    def __call__(self, source):
        """(float32 views [V, S, S, 3], (width, height))."""
        views, size = self.views(source)
        how = self.views.preprocess
        return (views * np.float32(1 / 255) - np.float32(how.mean)) / np.float32(how.std), size


def run(epoch: Callable[[], Iterator[int]]) -> tuple[float, float]:
    """(images per second, CPU milliseconds per image, child processes included) of one epoch."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    before, began = cpu(family), time.perf_counter()
    count = sum(epoch())
    seconds = time.perf_counter() - began
    return count / seconds, 1000 * (cpu(family) - before) / count


def cpu(family: list[psutil.Process]) -> float:
    """CPU seconds of processes so far."""
    return sum(sum(process.cpu_times()[:2]) for process in family)


def compare(paths: list[str], aspect: str, rounds: int, threads: list[int], workers: list[int], folder: str) -> None:
    """Print the table of one aspect mode."""
    sides: dict[str, list[Callable]] = {
        "torch DataLoader + CLIPImageProcessor": [peer(paths, aspect, n) for n in workers]
    }
    sides["this program"] = [ours(paths, aspect, n) for n in threads]
    sides["this program, float32 on the host"] = [ours(paths, aspect, n, floats=True) for n in threads]
    sides["this program, cache of resized images"] = [ours(paths, aspect, n, folder) for n in threads]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first starts the workers and fills caches
        for name, epochs in sides.items():
            results = [run(epoch) for epoch in epochs]
            found[name] += results if number else []
    cores, base = len(os.sched_getaffinity(0)), None
    print(f"\n| {aspect} | images/s | per core | CPU ms per image | against the peer |\n|---|---|---|---|---|")
    for name, results in found.items():
        rate, spent = max(r for r, _ in results), min(c for _, c in results)
        base = base or (rate, spent)
        ratio = f"{rate / base[0]:.2f}x images/s, {base[1] / spent:.2f}x CPU"
        print(f"| {name} | {rate:.0f} | {rate / cores:.0f} | {spent:.2f} | {ratio} |", flush=True)


def main() -> None:
    """Make the JPEGs and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", default="2,4")
    parser.add_argument("--workers", default="2,4")
    chosen = parser.parse_args()
    threads, workers = ([int(n) for n in text.split(",")] for text in (chosen.threads, chosen.workers))
    with tempfile.TemporaryDirectory() as made:
        paths = [str(Path(made, f"{i}.jpg")) for i in range(chosen.images)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda i: Path(paths[i]).write_bytes(photograph(i)), range(len(paths))))
        size = np.mean([Path(path).stat().st_size for path in paths]) / 1000
        cached = cache_bytes(len(paths), Preprocess()) / len(paths) / 1000
        print(
            f"{len(paths)} JPEGs of 640 x 480, {size:.0f} kB each ({cached:.0f} kB resized), {len(os.sched_getaffinity(0))} cores"
        )
        for aspect in ("square", "pad"):
            compare(paths, aspect, chosen.rounds, threads, workers, str(Path(made, "cache")))


if __name__ == "__main__":
    main()
