"""From an image file to the uint8 views [V, S, S, 3] of a vision tower, bit-equal to HF's CLIP and SigLIP.

    square   short side to S (bicubic), centre crop                                      V = 1
    pad      centred on a square of the mean colour, then as square                      V = 1
    anyres   [whole image squashed to S x S] + S x S tiles of the image padded to a grid V = 1 + tiles

SigLIP squashes to S x S where CLIP resizes the short side and crops. Only Pillow's BICUBIC on uint8 is
bit-exact. The float steps x/255, -mean, /std run on the device inside the tower.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_jax.config import CLIP_MEAN, CLIP_STD, ConfigError, UserError, VLMConfig
from vlm_jax.models import slots

LONGEST_RESIZED = 1 << 16  # thin images that would be blown up to gigabytes are refused: by the crop's resize
LONGEST_PADDED = 1 << 14  # or by the square canvas
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class ImageError(UserError):
    """An image that cannot be used; the message names the file and the record."""


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """An image file, or its bytes in `data` (`path` is then only a name); `record` says who needs it."""

    path: str
    record: str = ""
    data: bytes | None = None

    @property
    def label(self) -> str:
        """Words for messages."""
        return f"image {self.path}" + (f" of {self.record}" if self.record else "")

    @classmethod
    def of(cls, image: ImageSource | str | Path | bytes, record: str = "") -> ImageSource:
        """A source from whatever a sample holds: a source, a path, or encoded bytes."""
        if isinstance(image, ImageSource):
            return image
        return cls("in memory", record, image) if isinstance(image, bytes) else cls(str(image), record)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes views of `size` pixels; `fit` is "crop" (CLIP) or "squash" (SigLIP)."""

    size: int = 336
    aspect: str = "pad"
    fit: str = "crop"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pinpoints: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, config: VLMConfig) -> Preprocess:
        """The preprocessing that a model's config asks for."""
        v = config.vision
        fit = "squash" if v.kind == "siglip" else "crop"
        return cls(v.image_size, config.aspect, fit, v.mean, v.std, config.pinpoints)

    @property
    def pad_colour(self) -> tuple[int, ...]:
        """Mean colour, truncated to uint8: (122, 116, 104) for CLIP."""
        return tuple(int(255 * m) for m in self.mean)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Views of an RGB image, uint8 [V, S, S, 3]."""
        if self.aspect == "anyres":
            return np.stack([self._fit(view) for view in self._anyres(image)])
        return self._fit(pad_to_square(image, self.pad_colour) if self.aspect == "pad" else image)[None]

    def _anyres(self, image: Image.Image) -> list[Image.Image]:
        best = slots.select_best_resolution(*image.size, self.pinpoints)
        columns, rows = slots.tile_grid(*image.size, self.pinpoints, self.size)
        canvas, s = resize_and_pad(image, best), self.size
        tiles = [canvas.crop((x * s, y * s, (x + 1) * s, (y + 1) * s)) for y in range(rows) for x in range(columns)]
        return [image.resize((s, s), Image.Resampling.BICUBIC), *tiles]

    def _fit(self, image: Image.Image) -> np.ndarray:
        """The processor's resize and crop, uint8 [S, S, 3]."""
        s, (w, h) = self.size, image.size
        if (w, h) == (s, s):
            return np.asarray(image)
        if self.fit == "squash":
            return np.asarray(image.resize((s, s), Image.Resampling.BICUBIC))
        long = int(s * max(w, h) / min(w, h))
        if long > LONGEST_RESIZED:
            raise ValueError(f"{w}x{h} pixels is too thin to be cropped to a square")
        image = image.resize((s, long) if w <= h else (long, s), Image.Resampling.BICUBIC)
        left, top = (image.width - s) // 2, (image.height - s) // 2
        return np.asarray(image.crop((left, top, left + s, top + s)))


def load_views(source: ImageSource, how: Preprocess) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode `source` -> (uint8 views [V, S, S, 3], (width, height)); raises ImageError in one sentence."""
    image = open_image(source)
    try:
        return how(image), image.size
    except ConfigError:
        raise
    except (ValueError, MemoryError) as error:
        raise ImageError(f"{source.label} cannot be resized: {error}") from error


def open_image(source: ImageSource) -> Image.Image:
    """Decode the whole image as RGB (greyscale, palette and RGBA files are converted)."""
    return _read(source, lambda image: image.convert("RGB"))


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) from the file's header, without decoding."""
    return _read(source, lambda image: image.size)


def check_exists(source: ImageSource) -> None:
    """Raise ImageError if the file is not there, without opening it."""
    if source.data is None and not os.path.isfile(source.path):
        raise ImageError(_missing(source))


def _missing(source: ImageSource) -> str:
    return f"{source.label} does not exist: check its name and the image folder"


def _read(source: ImageSource, take):
    """`take(image)` of the opened file; every way a file can be broken becomes an ImageError."""
    try:
        with Image.open(source.path if source.data is None else io.BytesIO(source.data)) as image:
            return take(image)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ImageError(_missing(source)) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{source.label} is not an image file that Pillow can read") from error
    except BROKEN as error:
        raise ImageError(f"{source.label} is broken: {error}") from error


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """`image` centred on a square canvas of `colour` (LLaVA-1.5 `image_aspect_ratio=pad`)."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    if side > LONGEST_PADDED:
        raise ValueError(f"{image.width}x{image.height} pixels is too long to be padded to a square")
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def resize_and_pad(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """`image` scaled into `target` (w, h) keeping its aspect, centred on black (LLaVA-1.6 anyres)."""
    left, top, right, bottom = content_box(*image.size, target)
    canvas = Image.new("RGB", target, (0, 0, 0))
    canvas.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return canvas


def content_box(width: int, height: int, target: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the scaled image inside `target` (w, h); the free side is rounded up."""
    scale_w, scale_h = target[0] / width, target[1] / height
    if scale_w < scale_h:
        w, h = target[0], min(math.ceil(height * scale_w), target[1])
    else:
        w, h = min(math.ceil(width * scale_h), target[0]), target[1]
    left, top = (target[0] - w) // 2, (target[1] - h) // 2
    return left, top, left + w, top + h
