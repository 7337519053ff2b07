"""How fast does a run find its records again: first and second start on a JSON file of the size of LLaVA's mix665k, and the memory.

    python launch/bench/start.py [--records 665298] [--folder DIR] [--rows]

The file imitates llava_v1_5_mix665k.json: 665,298 records, about 1 GB, indented by two, 6 % without an image, the others naming 6,000
image files in turn. Every start is a process of its own; "cold" ones begin with the file out of memory (as far as the system lets go of
it). Resident memory is counted above that of Python with numpy and the package loaded, and includes what is mapped from the cache.
--rows: the whole data path of LLaVA-1.5 stage 2 in place of the file alone, from the recipe to the first row: the first start encodes
every record with a byte-level tokenizer made from the text (minutes), later ones read what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vlm_jax.data.records import Records

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
READS = 20_000  # random records
IMAGES = 1000  # files per folder


def write_like_mix665k(path: Path, records: int, seed: int = 0) -> None:
    """A JSON list of `records` dialogues with text lengths drawn log-normal, one to five rounds, mean 1.5 kB."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("aeinorstlcdu"), rng.integers(2, 10))) for _ in range(3000)]
    words += ['\\"quoted\\"', "caf\u00e9", "[0.12, 0.5]", "{x}", "line\\nbreak", "\\u00e9t\\u00e9", "C:\\\\"]
    text = " ".join(rng.choice(words, 200_000))
    starts = iter(rng.integers(0, len(text) - 10_000, 12 * records).tolist())
    lengths = iter(np.exp(rng.normal(4.75, 0.85, 12 * records)).astype(int).clip(3, 9000).tolist())

    def words_of(most: int) -> str:
        start = text.index(" ", next(starts)) + 1
        return text[start : text.index(" ", start + min(next(lengths), most))]

    rounds = rng.integers(1, 9, records) // 2 + 1
    shown = rng.random(records) < 0.94
    with open(path, "w", encoding="utf-8") as file:
        for k in range(records):
            turns = []
            for r in range(rounds[k]):
                question = words_of(300)
                asked = f"<image>\\n{question}" if shown[k] and r == 0 else question
                turns += [("human", asked), ("gpt", words_of(9000))]
            said = ",\n".join(f'      {{\n        "from": "{a}",\n        "value": "{b}"\n      }}' for a, b in turns)
            image = f'    "image": "{FOLDERS[k % 6]}/{k % IMAGES:012d}.jpg",\n' if shown[k] else ""
            head = "[\n" if k == 0 else ",\n"
            file.write(f'{head}  {{\n    "id": "{k:012d}",\n{image}    "conversations": [\n{said}\n    ]\n  }}')
        file.write("\n]\n")


def resident(key: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


def measure(path: str, cache: str) -> dict[str, float]:
    """One start in this process: its seconds, random reads per second after it, MB above the empty process now and at most."""
    before = resident("VmRSS")
    began = time.perf_counter()
    records = Records(path, "images", cache=cache)
    seconds = time.perf_counter() - began
    order = np.random.default_rng(1).integers(0, len(records), READS).tolist()
    began = time.perf_counter()
    for index in order:
        records[index]
    reads = READS / (time.perf_counter() - began)
    return {"seconds": seconds, "reads": reads, "after": resident("VmRSS") - before, "most": resident("VmHWM") - before}


def measure_rows(path: str, cache: str) -> dict[str, float]:
    """As `measure`, from the recipe to the plan of the first epoch; reads are the records of random rows, not encoded."""
    from vlm_jax.config import VLMConfig
    from vlm_jax.data.dataset import open_rows
    from vlm_jax.data.options import DataConfig
    from vlm_jax.data.tokenizer import load_tokenizer

    folder = Path(path).parent
    data = DataConfig(path=(path,), image_folder=str(folder / "images"), processes=os.cpu_count() or 1)
    before = resident("VmRSS")
    began = time.perf_counter()
    rows = open_rows(data, VLMConfig(), load_tokenizer(folder), cache=Path(cache), epochs=1)
    seconds = time.perf_counter() - began
    order = np.random.default_rng(1).integers(0, len(rows), READS // 4).tolist()
    began, read = time.perf_counter(), 0
    for row in order:
        for number in rows.records_of(row):
            source, inside = rows.source_of(int(number))
            read += bool(rows.sources[source][inside])
    reads = read / (time.perf_counter() - began)
    return {"seconds": seconds, "reads": reads, "after": resident("VmRSS") - before, "most": resident("VmHWM") - before}


def make_images_and_tokenizer(folder: Path, path: Path) -> None:
    """Empty files under the names that records use, and a tokenizer of 4,000 tokens from the text of the first records."""
    from vlm_jax.data.new_tokenizer import byte_level

    for name in FOLDERS:
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        for k in range(IMAGES):
            (folder / "images" / name / f"{k:012d}.jpg").touch()
    records = Records(path)
    texts = (text for k in range(min(2000, len(records))) for _, text in records[k].turns)
    byte_level(texts, 4000, folder)


def start(path: Path, cache: Path, cold: bool, rows: bool) -> dict[str, float]:
    """`measure` or `measure_rows` in a fresh process."""
    if cold:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--measure", str(path), "--cache", str(cache), *(["--rows"] if rows else [])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(records: int, folder: Path, rows: bool) -> None:
    """Write the file, start three times, print the table."""
    path, cache = folder / f"like_mix665k_{records}.json", folder / "cache"
    began = time.perf_counter()
    write_like_mix665k(path, records)
    os.sync()
    if rows:
        make_images_and_tokenizer(folder, path)
    print(f"{records} records, {path.stat().st_size / 1e9:.2f} GB, written in {time.perf_counter() - began:.0f} s\n")
    print(
        "| start | file in memory | seconds | random records/s | MB resident | MB at most |\n|---|---|---|---|---|---|"
    )
    for name, cold in (("first", True), ("second", True), ("second", False)):
        m = start(path, cache, cold, rows)
        print(
            f"| {name} | {'no' if cold else 'yes'} | {m['seconds']:.1f} | {m['reads']:,.0f} | {m['after']:.0f} | "
            f"{m['most']:.0f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=665_298)
    parser.add_argument("--folder", type=Path, help="where the file is written and left (default: a temporary folder)")
    parser.add_argument("--rows", action="store_true", help="measure the whole data path, not only the file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps((measure_rows if chosen.rows else measure)(chosen.measure, chosen.cache)))
    elif chosen.folder:
        chosen.folder.mkdir(parents=True, exist_ok=True)
        main(chosen.records, chosen.folder, chosen.rows)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(chosen.records, Path(temporary), chosen.rows)
