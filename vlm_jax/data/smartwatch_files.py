"""A smart-watch data set on disk, drawn by several processes; an interrupted call goes on where it stopped.

folder/settings.json   count, seed, style ...: what the folder holds or will hold     written first
folder/images/7.png    224 x 224 RGB                                                  written whole or not at all
folder/records.json    LLaVA records of all images                                    written last: the set is complete
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm_jax.config import UserError, one_of
from vlm_jax.data.smartwatch import MATERIALS, WHITE, Watch, render, sample_watch
from vlm_jax.data.smartwatch_claims import claims_records
from vlm_jax.data.smartwatch_text import STYLES, published_records, rounds_records

CHUNK = 64  # pictures handed to a process at a time
FEW = 256  # below this starting processes takes longer than drawing


@dataclasses.dataclass(frozen=True)
class WatchSet:
    """What to draw. style: "published" (three records per image, tasks generation, vqa, caption), "rounds" (one record that asks
    all five attributes, each in one of the first `wordings` published wordings) or "claims" (a caption and three questions, see
    smartwatch_claims). hands: colours (red, green, blue) of the hour, minute and second hand, or one for all."""

    count: int
    seed: int = 0
    style: str = "rounds"
    wordings: int = 10
    material: str = "pure"
    material_alpha: int = 255
    hands: tuple[tuple[int, int, int], ...] = (WHITE,)

    def __post_init__(self):
        one_of("style", self.style, STYLES)
        one_of("material", self.material, MATERIALS)
        if len(self.hands) not in (1, 3) or any(len(c) != 3 or not all(0 <= x <= 255 for x in c) for c in self.hands):
            raise UserError(f"hands={self.hands} must be one colour (red, green, blue) in 0..255, or three of them")
        if self.count < 1:
            raise UserError(f"count={self.count} smart-watches cannot be drawn: ask for at least 1")


def draw_all(settings: WatchSet) -> tuple[list[Watch], list[dict[str, Any]]]:
    """(watches, records) of a set, from one random stream as in the published generator: watch, its texts, next watch."""
    rng, watches, records = random.Random(settings.seed), [], []
    hour, minute, second = settings.hands * (3 // len(settings.hands))
    colours = {"hour_color": hour, "minute_color": minute, "second_color": second}
    for i in range(settings.count):
        watch = dataclasses.replace(
            sample_watch(rng), material=settings.material, material_alpha=settings.material_alpha, **colours
        )
        watches.append(watch)
        if settings.style == "published":
            records += published_records(rng, watch, f"{i}.png")
        elif settings.style == "claims":
            records += claims_records(rng, watch, f"{i}.png")
        else:
            records += rounds_records(rng, watch, f"{i}.png", settings.wordings)
    return watches, records


def generate(folder: str | Path, settings: WatchSet, *, processes: int | None = None, progress: bool = True) -> Path:
    """Write the set into `folder` unless it is there already; returns the path of its records.json.

    processes: how many draw (default: one per core); progress: show a bar.
    """
    folder = Path(folder)
    records_file = folder / "records.json"
    _claim(folder, settings)
    if records_file.exists():
        return records_file
    watches, records = draw_all(settings)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    there = set(os.listdir(images))
    missing = [(i, watch) for i, watch in enumerate(watches) if f"{i}.png" not in there]
    _draw(images, missing, processes or os.cpu_count() or 1, progress)
    _write(records_file, json.dumps(records, indent=4))
    return records_file


def _claim(folder: Path, settings: WatchSet) -> None:
    """Write settings.json, or check that the folder was made with the same ones."""
    file, wanted = folder / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if file.exists():
        found = json.loads(file.read_text())
        if {"hands": [list(WHITE)], **found} != wanted:  # sets drawn before hands had colours have white ones
            raise UserError(
                f"{folder} holds smart-watches drawn with {found}, not {wanted}: name another folder or delete it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, json.dumps(wanted, indent=4))


def _draw(images: Path, missing: list[tuple[int, Watch]], processes: int, progress: bool) -> None:
    bar = tqdm(total=len(missing), desc="draw", unit="image", disable=not progress, dynamic_ncols=True)
    save = functools.partial(_save, images)
    with bar:
        if processes == 1 or len(missing) < FEW:
            for item in missing:
                save(item)
                bar.update()
            return
        # spawn: a forked child of a process with JAX's threads may deadlock
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in pool.imap_unordered(save, missing, CHUNK):
                bar.update()


def _save(images: Path, item: tuple[int, Watch]) -> None:
    number, watch = item
    partial = images / f".{number}.partial"
    render(watch, seed=number).save(partial, format="PNG", compress_level=1)
    os.replace(partial, images / f"{number}.png")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
