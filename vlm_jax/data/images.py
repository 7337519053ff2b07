"""From an image file to the uint8 views [V, S, S, 3] of a vision tower, bit-equal to HF's CLIP and SigLIP.

    square   short side to S (bicubic), centre crop                                      V = 1
    pad      centred on a square of the mean colour, then S x S                          V = 1
    anyres   [whole image squashed to S x S] + S x S tiles of the image padded to a grid V = 1 + tiles

SigLIP squashes to S x S where CLIP resizes the short side and crops. Only Pillow's BICUBIC on uint8 is
bit-exact. The float steps x/255, -mean, /std run on the device inside the tower.

What is in a file is read as the published pipelines read it, with Pillow's convert("RGB"), but for 16 bits:

    grey, 1 bit, CMYK, YCbCr   converted by Pillow
    palette, RGBA, LA          transparency is dropped, what lies under it is shown
    16 bits a channel          the upper 8 bits (Pillow clips grey ones to 255, which whitens them)
    32-bit integers, floats    as 16 bits; clipped to 0..255 as Pillow does
    animated                   the first frame
    EXIF rotation, profiles    ignored, as in the published pipelines: rotate such files before training
    1 x 1, any small image     scaled up

What cannot be used raises ImageError with a `reason`:

    missing       no such file                  not_an_image  not a format Pillow knows, e.g. a web page
    folder        a folder in its place         broken        cut short or damaged
    unreadable    the system refuses to read    bomb          over 179 million pixels, seen in the header
    empty         no bytes                      too_thin      would be resized or padded to gigabytes
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.config import CLIP_MEAN, CLIP_STD, ConfigError, VLMConfig
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.models import slots

REASONS = ("missing", "folder", "unreadable", "empty", "not_an_image", "broken", "bomb", "too_thin")
LONGEST_RESIZED = 1 << 16  # long side that the crop may resize to: 1:195 at 336 pixels
LONGEST_PADDED = 1 << 15  # side that may be padded to a square
STRIP = 1 << 24  # pixels of a padded square that are in memory at a time


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
        """Views of an RGB image, uint8 [V, S, S, 3]; ValueError if it is too thin."""
        if self.aspect == "anyres":
            return np.stack([self._fit(view) for view in self._anyres(image)])
        return (self._pad(image) if self.aspect == "pad" else self._fit(image))[None]

    def _anyres(self, image: Image.Image) -> list[Image.Image]:
        best = slots.select_best_resolution(*image.size, self.pinpoints)
        columns, rows = slots.tile_grid(*image.size, self.pinpoints, self.size)
        canvas, s = resize_and_pad(image, best), self.size
        tiles = [canvas.crop((x * s, y * s, (x + 1) * s, (y + 1) * s)) for y in range(rows) for x in range(columns)]
        return [_resize(image, s, s), *tiles]

    def _fit(self, image: Image.Image) -> np.ndarray:
        """The processor's resize and crop, uint8 [S, S, 3].

        Pillow resizes along x, rounds to uint8, and then along y: what the crop drops is left out between the two.
        """
        s, (w, h) = self.size, image.size
        if (w, h) == (s, s) or self.fit == "squash":
            return np.asarray(_resize(image, s, s))
        long = int(s * max(w, h) / min(w, h))
        if long > LONGEST_RESIZED:
            raise ValueError(f"{w}x{h} pixels is too thin to be cropped to a square")
        at = (long - s) // 2
        if w >= h:
            return np.asarray(_resize(_resize(image, long, h).crop((at, 0, at + s, h)), s, s))
        return np.asarray(_resize(image, s, long).crop((0, at, s, at + s)))

    def _pad(self, image: Image.Image) -> np.ndarray:
        """`image` centred on a square of the mean colour (LLaVA-1.5 `image_aspect_ratio=pad`) and resized, uint8 [S, S, 3].

        The square is never whole in memory: rows beside the image stay as they are when they are resized along x.
        """
        s, (w, h), side = self.size, image.size, max(image.size)
        if side > LONGEST_PADDED:
            raise ValueError(f"{w}x{h} pixels is too long to be padded to a square")
        narrow, rows = Image.new("RGB", (s, side), self.pad_colour), max(1, STRIP // side)
        for y in range(0, h, rows):
            strip = image if rows >= h else image.crop((0, y, w, min(y + rows, h)))
            if w < side:
                canvas = Image.new("RGB", (side, strip.height), self.pad_colour)
                canvas.paste(strip, ((side - w) // 2, 0))
                strip = canvas
            narrow.paste(_resize(strip, s, strip.height), (0, (side - h) // 2 + y))
        return np.asarray(_resize(narrow, s, s))


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def load_views(source: ImageSource, how: Preprocess) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode `source` -> (uint8 views [V, S, S, 3], (width, height)); raises ImageError in one sentence."""
    image = open_image(source)
    try:
        return how(image), image.size
    except ConfigError:
        raise
    except (ValueError, MemoryError) as error:
        raise ImageError(f"{source.label} cannot be resized: {error}", "too_thin") from error


def open_image(source: ImageSource) -> Image.Image:
    """Decode the whole image as RGB, by the rules at the head of this module."""
    return _read(source, _as_rgb)


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) from the file's header, without decoding."""
    return _read(source, lambda image: image.size)


def check_exists(source: ImageSource) -> None:
    """Raise ImageError if the file is not there, without opening it."""
    if not source.exists():
        raise _missing(source)


def _missing(source: ImageSource) -> ImageError:
    if os.path.isdir(source.path):
        return ImageError(f"{source.label} is a folder: name the image file in it", "folder")
    return ImageError(f"{source.label} does not exist: check its name and the image folder", "missing")


def _as_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image.info.pop("transparency", None)  # not used by the conversion, which would only warn about it
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 0xFFFF) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _read(source: ImageSource, take: Callable[[Image.Image], Any]) -> Any:
    """`take(image)` of the opened file; every way a file can be broken becomes an ImageError."""
    try:
        with Image.open(source.open()) as image:
            return take(image)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _missing(source) from error
    except Image.UnidentifiedImageError as error:
        raise _not_an_image(source) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{source.label} is too large to be decoded: {_line(error)}", "bomb") from error
    except Exception as error:  # a decoder that is given garbage raises anything
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(f"{source.label} cannot be read: {error.strerror}", "unreadable") from error
        raise ImageError(f"{source.label} is broken: {_line(error)}", "broken") from error


def _not_an_image(source: ImageSource) -> ImageError:
    """What a file is that Pillow does not know."""
    head = source.read()[:256]
    if not head:
        return ImageError(f"{source.label} is empty, a file of 0 bytes: fetch it again", "empty")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return ImageError(f"{source.label} is a web page, not an image file: fetch it again", "not_an_image")
    return ImageError(f"{source.label} is not an image file that Pillow can read", "not_an_image")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
