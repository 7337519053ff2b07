"""Cut images as rows, with a class or a caption: what `pipeline.Batches` reads for priors that encode images while they train.

    row k   image order_e[k mod N] of epoch e = k // N, cut by the draws of (seed, e, image)
            {"images": uint8 [S, S, 3]} and what `code_rows` has beside the codes

Order and draws are those of `code_rows.CodeRows`: where `tokenize` cuts as `data.crop` does, both show the same codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.data.code_options import CodeDataConfig
from vlm_jax.data.code_rows import VIEW, Captions, Labels, Texts, Unlabelled
from vlm_jax.data.code_views import COUNTS, Views
from vlm_jax.data.crops import FLIP, Crop, load_crop
from vlm_jax.data.draws import Draws
from vlm_jax.data.image_lists import ImageList, named, open_images
from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.data.image_rows import ImageRows
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.kept_arrays import hash_of
from vlm_jax.data.manifest import DataError
from vlm_jax.data.measuring import Limits


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is shown of an image: see CodeDataConfig.crop."""

    rule: str
    size: int
    flip: float = 0.0
    margin: float = 1.1

    def __call__(self, source: ImageSource, draws: Draws) -> np.ndarray:
        """uint8 [S, S, 3]; raises ImageError in one sentence."""
        place = dataclasses.replace(draws, seed=~draws.seed)  # other numbers than those that choose views and captions
        if self.rule not in COUNTS:
            return load_crop(source, Crop(self.size, self.rule, self.flip), place)
        views = Views(self.rule, self.size, self.margin).load(source)[0]
        view = views[draws.integer(VIEW, 0, len(views) - 1)]
        return np.ascontiguousarray(view[:, ::-1]) if self.flip and place.uniform(FLIP) < self.flip else view


class ConditionedImages(ImageRows):
    """Rows of a run over those of the `images` that have a condition; `known` is what they are drawn from."""

    def __init__(
        self,
        images: Mapping[str, ImageSource],
        known: Labels | Captions | Texts | Unlabelled,
        cut: Cut,
        *,
        skipped: Sequence[str] = (),
        limits: Limits = Limits(),
        **how: Any,
    ):
        self.known, self._cut, self._all, self._names = known, cut, list(images.values()), hash_of(*images)
        lost = len(known.skipped)
        limits.check(lost, lost, len(images), lambda: known.skipped[0])
        if not len(known.usable):
            raise DataError(f"none of the {len(images)} images has a caption; the first: {known.skipped[0]}")
        usable = ImageList([self._all[number] for number in known.usable], skipped)
        super().__init__(usable, Crop(cut.size), limits=limits, **how)

    def records_of(self, row: int) -> np.ndarray:
        """[1]: number of the image that row `row` should show, among all."""
        return self.known.usable[super().records_of(row)]

    def _read(self, number: int, epoch: int) -> dict[str, np.ndarray]:
        number = int(self.known.usable[number])
        draws = Draws(self.seed, epoch, number)
        return {"images": self._cut(self._all[number], draws)} | self.known.of(number, draws)

    def counts(self) -> dict[str, int]:
        """What is not trained on, for the metrics; of broken images only those that this process met."""
        return {"unusable_images": super().counts()["unusable_images"] + len(self.known.skipped)}

    def identity(self) -> dict[str, Any]:
        """What decides the order of images and their cuts, as a checkpoint keeps it (JSON; see data.resume)."""
        said = {
            "data.seed": self.seed,
            "data.crop": self._cut.rule,
            "data.margin": self._cut.margin,
            "data.flip": self._cut.flip,
            "the pixels of an image": self._cut.size,
            "the number of images": len(self.images),
            "the hash of their names": self._names[:16],
        }
        return super().identity() | {"packing": said}


def find_images(data: CodeDataConfig, cache: Path) -> tuple[dict[str, ImageSource], Sequence[str]]:
    """({name: image} of data.path, sentences about records that could not be read); cache: for what is found out about shards."""
    found = open_images(ImageDataConfig(path=data.path, image_folder=data.image_folder), cache)
    return named(found, data.path), found.skipped


def make_images(folder: Path, count: int, size: int, classes: int, seed: int) -> dict[str, int]:
    """{name: class} of `count` made-up images below `folder`/images: flat colours that follow from the class, and a little noise."""
    rng, made = np.random.default_rng(seed), {}
    colours = rng.integers(0, 256, (classes, 1, 1, 3))
    for number in range(count):
        label = number % classes
        name = f"{label:03d}/{number:06d}.png"
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(-20, 21, (size, size, 3))
        Image.fromarray(np.clip(colours[label] + noise, 0, 255).astype(np.uint8)).save(file)
        made[name] = label
    return made
