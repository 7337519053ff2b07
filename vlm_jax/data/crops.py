"""From an image of any size to S x S pixels for a visual tokenizer: the crop rules of the published programs, by name.

    random_scale  short side drawn from [S, 1.25 S], halved by a box filter while twice too large, bicubic; random place  LlamaGen
    centre_box    short side S in the same way; the centre, rounded down                                       LlamaGen, evaluation
    random_place  short side S, bilinear; random place                                           RQ-VAE, HQ-VAE, UniCode
    centre        short side S, bilinear; the centre, rounded as torchvision does                their evaluation, UniCode's codes
    random_area   a random square of 75 to 100 % of the area, resized to S, bilinear             RQ-VAE and HQ-VAE on faces
    squash        the whole image, S x S whatever its shape, bicubic                             UniCode's vision tower

Everything random follows from one `Draws`; rules without "random" need none, unless images are mirrored.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from vlm_jax.config import at_least_one, one_of
from vlm_jax.data.draws import Draws
from vlm_jax.data.image_options import CROPS
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.images import LONGEST_RESIZED, open_image

FLIP, SCALE, TOP, LEFT, AREA = 0, 1, 2, 3, 4  # draws; of `random_area` try k has AREA + 3 k and the two behind it
TRIES = 10  # squares that are drawn until one fits into an oblong image
LARGEST_SCALE, SMALLEST_AREA = 1.25, 0.75

Box, Bilinear, Bicubic = Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@dataclasses.dataclass(frozen=True)
class Crop:
    """A rule of the module's table for `size` pixels; flip: share of images that are mirrored."""

    size: int = 256
    rule: str = "centre"
    flip: float = 0.0

    def __post_init__(self):
        one_of("crop", self.rule, CROPS)
        at_least_one("crop", self, ("size",))

    def __call__(self, image: Image.Image, draws: Draws | None = None) -> np.ndarray:
        """uint8 [S, S, 3] of an RGB image; ValueError if it is too thin to be resized."""
        pixels = np.asarray(getattr(self, f"_{self.rule}")(image, draws))
        mirrored = self.flip > 0 and draws.uniform(FLIP) < self.flip
        return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels

    def _random_scale(self, image: Image.Image, draws: Draws) -> Image.Image:
        short = draws.integer(SCALE, self.size, int(self.size * LARGEST_SCALE))
        return self._placed(_halved(image, short), draws)

    def _centre_box(self, image: Image.Image, _: Draws | None) -> Image.Image:
        image = _halved(image, self.size)
        return self._cut(image, (image.width - self.size) // 2, (image.height - self.size) // 2)

    def _random_place(self, image: Image.Image, draws: Draws) -> Image.Image:
        return self._placed(_shortened(image, self.size), draws)

    def _centre(self, image: Image.Image, _: Draws | None) -> Image.Image:
        image = _shortened(image, self.size)
        return self._cut(image, round((image.width - self.size) / 2), round((image.height - self.size) / 2))

    def _random_area(self, image: Image.Image, draws: Draws) -> Image.Image:
        w, h = image.size
        side, x, y = min(w, h), (w - min(w, h)) // 2, (h - min(w, h)) // 2
        for k in range(AREA, AREA + 3 * TRIES, 3):
            wanted = round((w * h * (SMALLEST_AREA + (1 - SMALLEST_AREA) * draws.uniform(k))) ** 0.5)
            if wanted <= min(w, h):
                side, x, y = wanted, draws.integer(k + 1, 0, w - wanted), draws.integer(k + 2, 0, h - wanted)
                break
        return image.crop((x, y, x + side, y + side)).resize((self.size, self.size), Bilinear)

    def _squash(self, image: Image.Image, _: Draws | None) -> Image.Image:
        return image.resize((self.size, self.size), Bicubic)

    def _placed(self, image: Image.Image, draws: Draws) -> Image.Image:
        top = draws.integer(TOP, 0, image.height - self.size)
        return self._cut(image, draws.integer(LEFT, 0, image.width - self.size), top)

    def _cut(self, image: Image.Image, x: int, y: int) -> Image.Image:
        return image.crop((x, y, x + self.size, y + self.size))


def _halved(image: Image.Image, short: int) -> Image.Image:
    """The short side becomes `short`, by halvings first."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Box)
    scale = short / min(image.size)
    return _resized(image, round(image.width * scale), round(image.height * scale), Bicubic)


def _shortened(image: Image.Image, short: int) -> Image.Image:
    """The short side becomes `short`, the long one is rounded down."""
    w, h = image.size
    if w <= h:
        return _resized(image, short, int(short * h / w), Bilinear)
    return _resized(image, int(short * w / h), short, Bilinear)


def _resized(image: Image.Image, width: int, height: int, how: Image.Resampling) -> Image.Image:
    if max(width, height) > LONGEST_RESIZED:
        raise ValueError(f"{image.width}x{image.height} pixels is too thin to be cut to a square")
    return image if image.size == (width, height) else image.resize((width, height), how)


def load_crop(source: ImageSource, crop: Crop, draws: Draws | None = None) -> np.ndarray:
    """Decode `source` and cut it, uint8 [S, S, 3]; raises ImageError in one sentence."""
    image = open_image(source)
    try:
        return crop(image, draws)
    except (ValueError, MemoryError) as error:
        raise ImageError(f"{source.label} cannot be resized: {error}", "too_thin") from error
