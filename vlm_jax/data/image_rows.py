"""Cut images as rows, in an order that depends on the images, seed and row alone: what `pipeline.Batches` reads for visual tokenizers.

    row k   image order_e[k mod N] of epoch e = k // N, cut by the draws of (seed, e, image)      {"images": uint8 [S, S, 3]}

A broken image is replaced by the next one that is not, counted and named.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import numpy as np

from vlm_jax.data.crops import Crop, load_crop
from vlm_jax.data.draws import Draws
from vlm_jax.data.image_lists import ImageList
from vlm_jax.data.image_source import ImageError
from vlm_jax.data.measuring import Limits
from vlm_jax.data.packing import permutation

log = logging.getLogger(__name__)


class ImageRows:
    """Rows of a run over N `images`; any row number is valid, `len` is what was asked for.

    epochs: passes; least_rows: at least so many rows, whatever the epochs. limits: what stops the run when images are broken.
    """

    def __init__(
        self,
        images: ImageList,
        crop: Crop,
        *,
        epochs: int = 1,
        least_rows: int = 0,
        seed: int = 0,
        limits: Limits = Limits(),
    ):
        self.images, self.crop, self.seed, self._limits = images, crop, seed, limits
        self._rows = max(epochs * len(images), least_rows)
        self._order = functools.lru_cache(4)(lambda epoch: permutation(len(images), seed, epoch))
        self._lock = threading.Lock()
        self.broken: dict[int, str] = {}  # image number -> sentence
        self._check(images.skipped[0] if images.skipped else "")

    def __len__(self) -> int:
        return self._rows

    def records_of(self, row: int) -> np.ndarray:
        """[1]: number of the image that row `row` should show."""
        epoch, place = divmod(row, len(self.images))
        return self._order(epoch)[place : place + 1]

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(row, len(self.images))
        number = int(self._order(epoch)[place])
        while True:
            try:
                return self._read(number, epoch)
            except ImageError as error:
                self._count_broken(number, str(error))
                number = (number + 1) % len(self.images)

    def _read(self, number: int, epoch: int) -> dict[str, np.ndarray]:
        """What a row shows of image `number` in `epoch`; ImageError if it is broken."""
        return {"images": load_crop(self.images[number], self.crop, Draws(self.seed, epoch, number))}

    def _count_broken(self, number: int, sentence: str) -> None:
        with self._lock:
            if number not in self.broken:
                log.warning("another image is taken in its place: %s", sentence)
            self.broken[number] = sentence
            self._check(f"the last one: {sentence}")
            if len(self.broken) == len(self.images):
                raise ImageError(f"none of the {len(self.images)} images can be used; {sentence}")

    def _check(self, words: str) -> None:
        lost = len(self.broken) + len(self.images.skipped)
        self._limits.check(lost, lost, len(self.images) + len(self.images.skipped), lambda: words)

    def counts(self) -> dict[str, int]:
        """What is not trained on, for the metrics; of broken images only those that this process met."""
        return {"unusable_images": len(self.broken) + len(self.images.skipped)}

    def identity(self) -> dict[str, Any]:
        """What decides the order of images and their crops, as a checkpoint keeps it (JSON; see data.resume)."""
        said = {
            "data.seed": self.seed,
            "data.size": self.crop.size,
            "data.crop": self.crop.rule,
            "data.flip": self.crop.flip,
            "the number of images": len(self.images),
            "the hash of their names": self.images.fingerprint[:16],
        }
        return {"seed": self.seed, "sources": {}, "packing": said, "mixture": {}, "encoder": "", "settings": {}}
