"""Originals beside their pictures, from a visual tokenizer or from two folders, and what is measured of them.

mse, psnr, ssim, lpips   means over images; psnr over those that differ at all, `identical` counts the others
rfid                     Fréchet distance of the originals' features and the pictures'
codebooks                usage and perplexity, where a tokenizer makes the pictures
watches                  what can be read on smart-watches, of originals and of pictures (watch_survival)
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import UserError
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.images import open_image
from vlm_jax.data.smartwatch import Watch
from vlm_jax.evaluate import image_metrics
from vlm_jax.evaluate.frechet import collect, frechet_distance
from vlm_jax.evaluate.inception import Inception
from vlm_jax.evaluate.watch_survival import Reader, survival
from vlm_jax.generate.tokenize import Item
from vlm_jax.generate.visual_codes import VisualCoder
from vlm_jax.parallel import hosts

AHEAD = 64  # images that are read before they are needed
THREADS = 8


class Pair(NamedTuple):
    """An image's name, its uint8 pixels [H, W, 3], and the picture that is compared with them."""

    name: str
    original: np.ndarray
    picture: np.ndarray


def pixels(source: ImageSource) -> np.ndarray:
    """uint8 [H, W, 3] of an image file; ImageError in one sentence."""
    return np.asarray(open_image(source))


def loaded(
    items: Sequence[Item], load: Callable[[ImageSource], np.ndarray] = pixels
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, pixels) in order, read ahead by threads; broken images are named on the screen and left out."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        waiting: collections.deque = collections.deque()
        for item in itertools.chain(items, [None] * AHEAD):
            waiting.append(item and (item.id, pool.submit(load, item.source)))
            if len(waiting) <= AHEAD or (first := waiting.popleft()) is None:
                continue
            try:
                yield first[0], first[1].result()
            except ImageError as error:
                hosts.say(str(error))


def coded_pairs(
    items: Sequence[Item],
    coder: VisualCoder,
    load: Callable[[ImageSource], np.ndarray],
    counts: image_metrics.CodeCounts,
) -> Iterator[Pair]:
    """Images, cut by `load`, with what their codes keep of them; the codes are added to `counts`."""
    images = loaded(items, load)
    while group := list(itertools.islice(images, coder.batch)):
        originals = np.stack([image for _, image in group])
        codes = coder.encode(originals)
        counts.add(codes)
        for (name, original), picture in zip(group, coder.decode(codes)):
            yield Pair(name, original, picture)


def folder_pairs(originals: Sequence[Item], pictures: Sequence[Item]) -> Iterator[Pair]:
    """Images of two places that have the same names, whatever their endings; UserError names one that is only in one of them."""
    ours, theirs = (
        {PurePath(item.id).with_suffix("").as_posix(): item for item in side} for side in (originals, pictures)
    )
    for side, other, flag in ((ours, theirs, "--reference"), (theirs, ours, "--images")):
        lost = next((side[name].id for name in side if name not in other), None)
        if lost:
            raise UserError(f"{lost} is not among {flag}: both need images of the same names")
    names = sorted(ours)
    paired = zip(loaded([ours[n] for n in names], _or_none), loaded([theirs[n] for n in names], _or_none))
    for (name, original), (_, picture) in paired:
        if original is not None and picture is not None:
            image_metrics.same_size(original.shape, picture.shape, name)
            yield Pair(name, original, picture)


def _or_none(source: ImageSource) -> np.ndarray | None:
    """Pixels, or None of a broken image, so that two sides stay in step."""
    try:
        return pixels(source)
    except ImageError as error:
        hosts.say(str(error))
        return None


@dataclasses.dataclass(frozen=True)
class Measures:
    """What to measure beside mse, psnr and ssim. batch: pairs at a time.

    network: for rfid; lpips: arrays of perceptual.read_lpips, {} for none; watches: {name: watch} for `reader`, {} for none.
    data_range: of SSIM; washed: UniCode's rFID, of images squeezed into the upper half of the range.
    """

    batch: int
    network: Inception | None = None
    lpips: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    watches: Mapping[str, Watch] = dataclasses.field(default_factory=dict)
    reader: Reader | None = None
    data_range: float = 255.0
    washed: bool = False

    def __call__(self, pairs: Iterator[Pair]) -> dict[str, Any]:
        """See the module; UserError where there is no pair."""
        values: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        features: dict[str, list[np.ndarray]] = {"originals": [], "pictures": []}
        watches: dict[str, list] = {"originals": [], "pictures": [], "truth": []}
        while group := list(itertools.islice(pairs, self.batch)):
            for name, found in self._values(group).items():
                values[name].append(found)
            sides = {"originals": [p.original for p in group], "pictures": [p.picture for p in group]}
            for side, images in sides.items():
                if self.network:
                    features[side].append(self.network([self._shown(image) for image in images]))
                if self.watches:
                    watches[side] += [self.reader(image) for image in images]
            if self.watches:
                watches["truth"] += [self._truth(p.name) for p in group]
        if not values:
            raise UserError("none of the images can be used: the lines above say why")
        result = _means({name: np.concatenate(found) for name, found in values.items()})
        if self.network:
            a, b = (collect(blocks, self.network.dims).moments(side) for side, blocks in features.items())
            result |= {"rfid": frechet_distance(a, b), "dims": self.network.dims, "full_rank": a.full_rank}
        if self.watches:
            result["watches"] = {side: survival(watches[side], watches["truth"]) for side in sides}
        return result

    def _values(self, group: Sequence[Pair]) -> dict[str, np.ndarray]:
        """mse, ssim and lpips of each pair; pairs of several sizes one by one."""
        alike = len({p.original.shape for p in group}) == 1
        blocks = [group] if alike else [[p] for p in group]
        size = self.batch if alike else 1
        found = collections.defaultdict(list)
        for block in blocks:
            # filled up to the shape that is compiled already
            full = [*block, *[block[-1]] * (size - len(block))]
            a, b = (np.stack([p[side] for p in full]) for side in (1, 2))
            found["mse"].append(image_metrics.mse(a, b)[: len(block)])
            found["ssim"].append(image_metrics.ssim(a, b, self.data_range)[: len(block)])
            if self.lpips:
                found["lpips"].append(image_metrics.lpips(self.lpips, a, b)[: len(block)])
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _shown(self, image: np.ndarray) -> np.ndarray:
        """What the network sees of an image."""
        return (image / 2 + 127.5).astype(np.uint8) if self.washed else image

    def _truth(self, name: str) -> Watch:
        stem = PurePath(name).stem
        if stem not in self.watches:
            raise UserError(f"{name} is no picture of --data: smart-watch pictures are called 0.png, 1.png ...")
        return self.watches[stem]


def _means(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means over images; psnr is None where no image differs."""
    psnr = image_metrics.psnr(values["mse"])
    differ = np.isfinite(psnr)
    means = {name: float(np.mean(found, dtype=np.float64)) for name, found in values.items()}
    return {
        "images": len(psnr),
        "identical": int((~differ).sum()),
        "mse": means["mse"],
        "psnr": float(psnr[differ].mean()) if differ.any() else None,
        **{name: means[name] for name in ("ssim", "lpips") if name in means},
    }
