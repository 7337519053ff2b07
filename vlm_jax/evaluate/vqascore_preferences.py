"""Benchmarks that ask which of two: Winoground, EqBen, NaturalBench, SugarCrepe and Pick-a-Pic, in their published files.

winoground    metadata.csv (id, image_0, image_1, caption_0, caption_1), examples.jsonl and why_winoground_hard.json for its tags
eqben         all_select.json [{image0, image1, caption0, caption1}], images in images/; subset: first folder of image0
naturalbench  metadata.json [{index, image_0, image_1, caption_0, caption_1}]
sugarcrepe    add_obj.json ... {number: {filename, caption, negative_caption}}, images of COCO val2017
pickapic      test_captions.json [{id, caption, label_0, label_1, image_0, image_1}], 100 chosen ones
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlm_jax.evaluate.vqascore_files import (
    BenchmarkError,
    Entry,
    Item,
    Numbers,
    ScoreSet,
    entries_of,
    folder_of,
    lines_of,
    read_json,
    table_of,
)  # fmt: skip
from vlm_jax.evaluate.vqascore_metrics import preferences, preferred

EQBEN_SUBSETS = {
    "eqbensd": ("eqbensd",), "eqbenk": ("eqbenkubric_cnt", "eqbenkubric_loc", "eqbenkubric_attr"), "eqbeng": ("eqbengebc",),
    "eqbenag": ("eqbenag",), "eqbeny": ("eqbenyoucook2",),
}  # fmt: skip
SUGARCREPE = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
# ids of the test captions that linzhiqiu/t2v_metrics chose by hand, in its order
PICKED = (
    1, 9, 385, 14, 138, 5, 31, 33, 39, 352, 21, 417, 399, 17, 82, 412, 78, 53, 54, 59, 60, 308, 76, 142, 98, 259, 317, 110, 113, 118,
    112, 119, 144, 148, 149, 153, 159, 162, 172, 111, 124, 196, 197, 220, 35, 141, 252, 475, 368, 214, 150, 43, 221, 163, 228, 236, 57,
    326, 257, 266, 268, 62, 274, 277, 278, 281, 105, 285, 286, 301, 419, 91, 312, 316, 318, 319, 334, 335, 339, 340, 347, 350, 367,
    374, 375, 382, 376, 387, 345, 405, 411, 478, 441, 444, 99, 384, 472, 479, 490, 493,
)  # fmt: skip


def winoground(data: Path) -> ScoreSet:
    """400 pairs of images and captions of the same words (arXiv 2204.03162): text, image and group score, by tag too."""
    lines = table_of(data / "metadata.csv", ("id", "image_0", "image_1", "caption_0", "caption_1"))
    ids = {int(line.number("id")): at for at, line in enumerate(lines)}
    return ScoreSet([_square(line, data, "_") for line in lines], _by_tag(_winoground_tags(data, ids)))


def _winoground_tags(data: Path, ids: Mapping[int, int]) -> dict[str, list[int]]:
    """{tag: items}, of the files that are there."""
    tags: dict[str, list[int]] = {}

    def add(tag: str, number: int, where: str) -> None:
        if number not in ids:
            raise BenchmarkError(f"{where} is about example {number}, which metadata.csv does not have")
        tags.setdefault(tag, []).append(ids[number])

    if (data / "examples.jsonl").exists():
        for example in lines_of(data / "examples.jsonl"):
            number = int(example.number("id"))
            add(f"{int(example.number('num_main_preds'))} Main Pred", number, example.where)
            add(example.text("collapsed_tag"), number, example.where)
    hard = data / "why_winoground_hard.json"
    if hard.exists():
        for entry in _listed(hard):
            number = int(entry.number("id"))
            for tag in entry.get("tags", list, "a list of tags") or ["No Tag"]:
                add(str(tag), number, entry.where)
    return tags


def _listed(path: Path) -> list[Entry]:
    """{id: [tags]} as entries."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise BenchmarkError(f"{path} must be an object {{id: [tags]}}")
    return [Entry({"id": key, "tags": tags}, f"entry {key} of {path}") for key, tags in found.items()]


def eqben(data: Path) -> ScoreSet:
    """EqBen's subset for vision-language models (arXiv 2303.14465): text, image and group score, by subset too."""
    entries, images = entries_of(data / "all_select.json"), folder_of(data, "images")
    subsets: dict[str, list[int]] = {}
    for at, entry in enumerate(entries):
        first = entry.text("image0").split("/")[0]
        subset = next((name for name, folders in EQBEN_SUBSETS.items() if first in folders), None)
        if subset:
            subsets.setdefault(subset, []).append(at)
    return ScoreSet([_square(entry, images, "") for entry in entries], _by_tag(subsets))


def naturalbench(data: Path) -> ScoreSet:
    """NaturalBench as retrieval (arXiv 2410.14669): text, image and group score."""
    entries = entries_of(data / "metadata.json")
    return ScoreSet([_square(entry, data, "_") for entry in entries], _by_tag({}))


def _square(entry: Entry, images: Path, between: str) -> Item:
    """Two images and two captions; `between` stands before their number in the keys."""
    return Item(
        tuple(entry.image(images, f"image{between}{i}") for i in (0, 1)),
        tuple(entry.text(f"caption{between}{i}") for i in (0, 1)),
    )


def _by_tag(tags: Mapping[str, Sequence[int]]):
    """Scores -> text, image and group score of all items and of those with each tag."""

    def numbers(scores: Sequence[np.ndarray]) -> Numbers:
        right = preferences(np.stack(scores))

        def mean(items: Sequence[int] | slice) -> dict[str, float]:
            shares = {kind: float(values[items].mean()) for kind, values in right.items()}
            return {**shares, "items": len(right["text"][items])}

        return {"all": mean(slice(None)), **{tag: mean(items) for tag, items in tags.items()}}

    return numbers


def sugarcrepe(data: Path) -> ScoreSet:
    """A caption and a hard negative made of it (arXiv 2306.14610): how often the caption scores at least as high, by kind.

    "macro" is the mean of the kinds, add, replace and swap the mean of theirs.
    """
    images = folder_of(data, "val2017", "coco2017/val2017", "images")
    folder = folder_of(data, "sugar_crepe")
    items: list[Item] = []
    kinds: dict[str, list[int]] = {}
    for kind in SUGARCREPE:
        if not (folder / f"{kind}.json").exists():
            continue
        for entry in entries_of(folder / f"{kind}.json"):
            kinds.setdefault(kind, []).append(len(items))
            texts = (entry.text("caption"), entry.text("negative_caption"))
            items.append(Item((entry.image(images, "filename"),), texts))
    if not items:
        raise BenchmarkError(f"{folder} has none of {', '.join(f'{kind}.json' for kind in SUGARCREPE)}")

    def numbers(scores: Sequence[np.ndarray]) -> Numbers:
        right = preferred(np.concatenate(scores)) == 0
        rows = {kind: {"accuracy": float(right[at].mean()), "items": len(at)} for kind, at in kinds.items()}
        groups = {group: [rows[k] for k in rows if k.startswith(group)] for group in ("add", "replace", "swap")}
        groups["macro"] = list(rows.values())
        means = {
            name: {"accuracy": float(np.mean([r["accuracy"] for r in of])), "items": sum(r["items"] for r in of)}
            for name, of in groups.items()
            if of
        }
        return {**rows, **means}

    return ScoreSet(items, numbers)


def pickapic(data: Path) -> ScoreSet:
    """Two generated images for a caption (arXiv 2305.01569): how often the one that people chose scores higher.

    As published, the first image is the choice only if all chose it, and it is the answer where scores are equal.
    """
    path = data / "test_captions.json"
    known = {int(entry.number("id")): entry for entry in entries_of(path)}
    absent = [str(number) for number in PICKED if number not in known]
    if absent:
        raise BenchmarkError(
            f"{path} has no entries with id {', '.join(absent[:5])}: the test captions of Pick-a-Pic v1 are needed"
        )
    chosen = [known[number] for number in PICKED]
    labels = np.asarray([[entry.number("label_0"), entry.number("label_1")] for entry in chosen])
    items = [
        Item((entry.image(data, "image_0"), entry.image(data, "image_1")), (entry.text("caption"),)) for entry in chosen
    ]

    def numbers(scores: Sequence[np.ndarray]) -> Numbers:
        right = choices(np.stack(scores)[:, :, 0], labels)
        return {"all": {"accuracy": float(right.mean()), "items": len(right)}}

    return ScoreSet(items, numbers)


def choices(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scores and labels [n, 2 images] -> bool [n]: is what scores higher what people chose? See `pickapic` for equal ones."""
    return preferred(scores) == np.where(labels[:, 0] == 1, 0, 1)
