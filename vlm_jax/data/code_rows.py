"""Codes of images as rows, with a class or a caption: what `pipeline.Batches` reads for priors.

    row k   image order_e[k mod N] of epoch e = k // N, its set and view drawn by (seed, e, image)
            {"codes": int32 [h, w(, depth)]}, of several levels "codes_0" (coarsest), "codes_1" ..., and beside them
            nothing, "labels": int32 [] or [tokens of a text], or "captions": float32 [S, C] with "caption_mask": bool [S]

Captions are padded with zeros on the left, as LlamaGen was trained; texts are cut, or padded with token 0 at the end.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.data.code_records import Coded, Codes, CodesError, open_codes, write_shard
from vlm_jax.data.draws import Draws
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits
from vlm_jax.data.packing import permutation

Levels = Sequence[tuple[int, tuple[int, ...]]]

SET, VIEW, SHORT = range(3)  # what the draws of a row are for
MADE_UP = 4  # classes of what is made up, at most


class Labels:
    """Classes of images: of the file data.labels, or the numbers of their folders. classes: how many the prior knows; with 1 all
    images are of it.
    """

    def __init__(self, ids: Sequence[str], file: str, classes: int):
        self.skipped: list[str] = []
        known = _read_labels(file) if file else dict.fromkeys(ids, 0) if classes == 1 else _folders(ids)
        found = [known.get(name, known.get(_folder(name))) for name in ids]
        lost = next((name for name, label in zip(ids, found) if label is None), None)
        if lost is not None:
            raise DataError(f"{file} has neither the image {lost} nor its folder: every image needs a class")
        self.numbers = np.asarray(found, np.int32)
        highest = int(self.numbers.max())
        if highest >= classes or self.numbers.min() < 0:
            where = file or "the folders of the images"
            raise ConfigError(
                f"{where} give class {highest}, but prior.classes={classes}: raise it, or check data.labels"
            )
        self.usable = np.arange(len(ids))

    def of(self, number: int, draws: Draws) -> dict[str, np.ndarray]:
        """What row arrays an image has beside its codes."""
        return {"labels": self.numbers[number]}


class Unlabelled:
    """Images of a prior that knows no condition."""

    def __init__(self, ids: Sequence[str]):
        self.usable, self.skipped = np.arange(len(ids)), []

    def of(self, number: int, draws: Draws) -> dict[str, np.ndarray]:
        """What row arrays an image has beside its codes."""
        return {}


class _Files:
    """One .npy for each image in folders; `usable` images have one."""

    def __init__(self, ids: Sequence[str], data: CodeDataConfig):
        self._ids, self._data = ids, data
        there = np.array([self._file(data.captions, number).is_file() for number in range(len(ids))], bool)
        self.usable = np.flatnonzero(there)
        self.skipped = [
            f"{self._file(data.captions, n)} does not exist: the image has no caption" for n in np.flatnonzero(~there)
        ]

    def _file(self, folder: str, number: int) -> Path:
        return Path(folder) / PurePosixPath(self._ids[number]).with_suffix(".npy")

    def _load(self, number: int, draws: Draws) -> tuple[Path, np.ndarray]:
        file, data = self._file(self._data.captions, number), self._data
        if data.short_captions and draws.uniform(SHORT) < data.short_share:
            short = self._file(data.short_captions, number)
            file = short if short.is_file() else file
        try:
            return file, np.load(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read as an npy file ({error}): write the features again") from error


class Captions(_Files):
    """Features of captions. slots, width: what the prior takes of each."""

    def __init__(self, ids: Sequence[str], data: CodeDataConfig, slots: int, width: int):
        super().__init__(ids, data)
        self._shape = slots, width

    def of(self, number: int, draws: Draws) -> dict[str, np.ndarray]:
        """What row arrays an image has beside its codes."""
        slots, width = self._shape
        file, features = self._load(number, draws)
        features = features[0] if features.ndim == 3 and len(features) == 1 else features
        if features.ndim != 2 or features.shape[1] != width or not len(features):
            raise DataError(f"{file} has shape {features.shape}, but features of a caption are [n, {width}] here")
        kept = features[:slots].astype(np.float32)
        values, mask = np.zeros((slots, width), np.float32), np.zeros(slots, bool)
        values[slots - len(kept) :], mask[slots - len(kept) :] = kept, True
        return {"captions": values, "caption_mask": mask}


class Texts(_Files):
    """Texts as numbers. slots, vocabulary: what the prior takes of each."""

    def __init__(self, ids: Sequence[str], data: CodeDataConfig, slots: int, vocabulary: int):
        super().__init__(ids, data)
        self._slots, self._vocabulary = slots, vocabulary

    def of(self, number: int, draws: Draws) -> dict[str, np.ndarray]:
        """What row arrays an image has beside its codes."""
        file, tokens = self._load(number, draws)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise DataError(f"{file} is {tokens.dtype} of shape {tokens.shape}, but a text is integers [n] here")
        if tokens.min() < 0 or tokens.max() >= self._vocabulary:
            raise DataError(
                f"{file} has tokens up to {tokens.max()}, but the prior's vocabulary is 0 to {self._vocabulary - 1}"
            )
        labels = np.zeros(self._slots, np.int32)
        labels[: len(tokens)] = tokens[: self._slots]
        return {"labels": labels}


class CodeRows:
    """Rows of a run over the usable images of `sets`; any row number is valid, `len` is what was asked for.

    epochs: passes; least_rows: at least so many rows, whatever the epochs. limits: what stops the run when captions are missing.
    """

    def __init__(
        self,
        sets: Sequence[Codes],
        ids: Sequence[str],
        known: Labels | Captions | Texts | Unlabelled,
        *,
        epochs: int = 1,
        least_rows: int = 0,
        seed: int = 0,
        limits: Limits = Limits(),
    ):
        self.sets, self.ids, self.known, self.seed = sets, ids, known, seed
        lost = len(known.skipped)
        limits.check(lost, lost, len(ids), lambda: known.skipped[0])
        if not len(known.usable):
            raise DataError(f"none of the {len(ids)} images has a caption; the first: {known.skipped[0]}")
        self._rows = max(epochs * len(known.usable), least_rows)
        self._order = functools.lru_cache(4)(lambda epoch: permutation(len(known.usable), seed, epoch))

    def __len__(self) -> int:
        return self._rows

    def records_of(self, row: int) -> np.ndarray:
        """[1]: number of the image that row `row` shows."""
        epoch, place = divmod(row, len(self.known.usable))
        return self.known.usable[self._order(epoch)[place : place + 1]]

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        epoch, number = row // len(self.known.usable), int(self.records_of(row)[0])
        draws = Draws(self.seed, epoch, number)
        chosen = draws.integer(SET, 0, len(self.sets) - 1)
        coded = self.sets[chosen][number]
        if coded.id != self.ids[number]:
            raise CodesError(
                f"data.codes: image {number} is {self.ids[number]} in the first file, {coded.id} in number {chosen + 1}: they must "
                "be of the same images"
            )
        view = draws.integer(VIEW, 0, len(coded.codes[0]) - 1)
        codes = dict(zip(code_keys(len(coded.codes)), (level[view] for level in coded.codes)))
        return codes | self.known.of(number, draws)

    def counts(self) -> dict[str, int]:
        """What is not trained on, for the metrics."""
        return {"unusable_images": len(self.known.skipped)}

    def identity(self) -> dict[str, Any]:
        """What decides the order of images, as a checkpoint keeps it (JSON; see data.resume)."""
        said = {
            "data.seed": self.seed,
            "the number of images": len(self.known.usable),
            "the runs of `tokenize` that made the codes": [codes.shards[0].job for codes in self.sets],
        }
        return {"seed": self.seed, "sources": {}, "packing": said, "mixture": {}, "encoder": "", "settings": {}}


def code_keys(levels: int) -> tuple[str, ...]:
    """What a row calls the codes of each level, coarsest first."""
    return ("codes",) if levels == 1 else tuple(f"codes_{level}" for level in range(levels))


def soft_keys(levels: int) -> tuple[str, ...]:
    """What a batch calls the soft labels of each level, beside its codes."""
    return tuple(key.replace("codes", "soft") for key in code_keys(levels))


def open_sets(paths: Sequence[str], levels: Levels) -> tuple[list[Codes], list[str]]:
    """(codes of each path, names of their images), where all have these (entries of the codebook, shape) per level."""
    if not paths:
        raise ConfigError(
            "data.codes is empty: name what `tokenize` wrote, e.g. codes.arrayrecord, or in data.path images"
        )
    sets = [open_codes(path) for path in paths]
    for path, codes in zip(paths, sets):
        there = [(level["entries"], tuple(level["shape"])) for level in codes.about["levels"]]
        if [shape for _, shape in there] != [shape for _, shape in levels]:
            found, needed = (" and ".join(" x ".join(map(str, s)) for _, s in x) for x in (there, levels))
            raise ConfigError(f"{path} has codes of {found}, but this prior needs {needed}: see prior.grid")
        if there != list(levels):
            found, needed = (" and ".join(str(n) for n, _ in x) for x in (there, levels))
            raise ConfigError(f"{path} has codes of a table of {found}, but prior.codes is {needed}")
        if len(codes) != len(sets[0]):
            raise ConfigError(
                f"{path} has codes of {len(codes)} images, {paths[0]} of {len(sets[0])}: they must be the same images"
            )
    return sets, [sets[0][number].id for number in range(len(sets[0]))]


def make_codes(
    folder: Path, data: CodeDataConfig, levels: Levels, classes: int, caption: tuple[int, int] | None
) -> CodeDataConfig:
    """Codes of data.generated images that follow from their class but for a little noise; returns the config that reads them.

    levels: (entries of the codebook, shape) of each. caption: (slots, width) of what is made up for a caption, features or (width 0)
    tokens; None for none.
    """
    rng, folder = np.random.default_rng(data.seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    classes, images, labels = min(classes, MADE_UP), [], {}
    for number in range(data.generated):
        label, codes = number % classes, []
        for entries, shape in levels:
            size = math.prod(shape)
            noise = rng.integers(0, entries, size) * (rng.random(size) < 0.05)
            found = ((label * 7 + np.arange(size)) % entries + noise) % entries
            codes.append(found.reshape(1, *shape).astype(np.int32))
        name = f"{label:03d}/{number:06d}.png"
        images.append(Coded(name, tuple(codes), levels[-1][1][:2]))
        labels[name] = label
    about = {
        "levels": [{"entries": entries, "shape": list(shape)} for entries, shape in levels],
        "dtype": "int32",
        "hash": "",
        "model": "generated",
    }
    file = folder / "codes.arrayrecord"
    write_shard(file, images, job=f"generated {data.generated} {data.seed}", broken=[], about=about)
    captions = make_captions(folder / "captions", labels, caption) if caption else ""
    return CodeDataConfig((os.fspath(file),), captions=captions, seed=data.seed, threads=data.threads)


def make_captions(folder: Path, labels: Mapping[str, int], caption: tuple[int, int]) -> str:
    """`folder` with one made-up caption for each of {image: class}, which follows from the class; caption: see make_codes."""
    slots, width = caption
    for name, label in labels.items():
        length = 1 + label % slots
        file = (folder / name).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.full((length, width), label / MADE_UP, np.float32) if width else np.full(length, label))
    return os.fspath(folder)


def _folder(name: str) -> str:
    return PurePosixPath(name).parts[0] if "/" in name else ""


def _folders(ids: Sequence[str]) -> dict[str, int]:
    """{folder: number} of the first folders in the images' names."""
    bare = next((name for name in ids if not _folder(name)), None)
    if bare is not None:
        raise DataError(f"the image {bare} lies in no folder that could name its class: give data.labels, a JSON file")
    return {name: number for number, name in enumerate(sorted({_folder(name) for name in ids}))}


def _read_labels(file: str) -> dict[str, int]:
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data.labels={file} cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict) or not all(type(label) is int for label in raw.values()):
        raise DataError(f"data.labels={file} must be a JSON object {{image or folder: number of its class}}")
    return raw
