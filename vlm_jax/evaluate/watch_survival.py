"""Whether the facts of smart-watches survive reconstruction: pictures are read by comparing them with drawings, without a model.

    weather, battery   in each corner the picture's fine structure (what a blur takes away) is compared with that of every drawing:
                       3 icons, 101 numbers of which only the text counts, not the bar; each sharp and a little softened
    second, minute,    rings of the face in which only the second hand, then the minute hand too, then all three are; whiteness,
    hour               1 on a hand and 0 on the face, is compared with drawings of every angle beside the hands that are known

A drawing d fits pixels p by cosine p.d / |p||d|, and is there by gain p.d / |d|^2: 1 where it is as strong as drawn. The best
cosine is read if both are large enough; otherwise the fact is not legible, which counts as lost. The reader knows neither the watch nor
its corners, so a right reading means that whoever looks can know it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from vlm_jax.config import UserError, from_dict
from vlm_jax.data.crops import Crop
from vlm_jax.data.smartwatch import CENTRE, CORNERS, HANDS, RADIUS, SIZE, WEATHERS, WHITE, Watch, hand_ends, render
from vlm_jax.data.smartwatch_files import WatchSet, draw_all

COSINE, GAIN = 0.6, 0.3  # of a drawing that counts as there
CONTRAST = 8.0  # levels between hands and face, below which no hand can be seen
BOXES = {
    "weather": (0, 0, 30, 30),
    "battery": (28, -1, 56, 13),
}  # x0, y0, x1, y1 from a corner; the battery's is its text
COARSE = {"weather": 5.0, "battery": 3.0}  # pixels of 224: standard deviation of the blur that is taken away
SOFT = (0.0, 1.0, 2.0)  # and of the drawings: reconstructions are softer than originals
RINGS = {"second": (0.73, 0.88), "minute": (0.53, 0.68), "hour": (0.2, 0.48)}  # in radii, in the order they are read
FACTS = ("weather", "battery", "hour", "minute", "second")
_BLANK = Watch(0, 0, 0, (0, 0, 0), "sunny", 0, "top-left", "bottom-right")


class Reading(NamedTuple):
    """What a picture shows; None is not legible."""

    weather: tuple[str, str] | None  # (word, corner)
    battery: tuple[int, str] | None  # (percent, corner)
    hour: int | None
    minute: int | None
    second: int | None

    def right(self, watch: Watch) -> dict[str, bool]:
        """By fact, whether it is that of `watch`."""
        truth = Reading(
            (watch.weather, watch.weather_pos),
            (watch.battery, watch.battery_pos),
            watch.hour % 12,
            watch.minute,
            watch.second,
        )
        return {fact: getattr(self, fact) == getattr(truth, fact) for fact in FACTS}


class _Signs(NamedTuple):
    """Drawings in one corner: values[k] has the unit vector directions[k] and, where it is sharp, the length lengths[k]."""

    box: tuple[slice, slice]
    values: tuple
    directions: np.ndarray
    lengths: np.ndarray


class Reader:
    """Reads watches that were drawn with white hands on a face of one colour and cut by `crop`, which must not be random."""

    def __init__(self, crop: Crop):
        if crop.rule.startswith("random") or crop.flip:
            raise UserError(f"watches cut by the rule {crop.rule} cannot be read: use squash, centre or centre_box")
        self.crop, self.scale = crop, crop.size / SIZE
        self._mask = functools.lru_cache(4096)(self._draw)
        place = (np.arange(crop.size) + 0.5) / self.scale - 0.5 - CENTRE
        radius = np.hypot(place[:, None], place) / RADIUS
        self._face = (radius > 0.15) & (radius < 0.95)
        self._rings = {hand: (radius > low) & (radius < high) for hand, (low, high) in RINGS.items()}

    def __call__(self, pixels: np.ndarray) -> Reading:
        """The reading of uint8 [S, S, 3]."""
        if pixels.shape != (self.crop.size, self.crop.size, 3):
            raise UserError(f"a picture of shape {pixels.shape} cannot be read as {self.crop.size} x {self.crop.size}")
        pixels = pixels.astype(np.float32)
        return Reading(self._sign(pixels, "weather"), self._sign(pixels, "battery"), *self._time(pixels))

    def _sign(self, pixels: np.ndarray, kind: str) -> tuple[Any, str] | None:
        best, found = COSINE, None
        for corner, signs in self._signs[kind].items():
            patch = self._fine(pixels[signs.box], kind)
            along = signs.directions @ patch
            cosine = along / max(np.linalg.norm(patch), 1e-6)
            k = int(cosine.argmax())
            if cosine[k] > best and along[k] > GAIN * signs.lengths[k]:
                best, found = cosine[k], (signs.values[k], corner)
        return found

    @functools.cached_property
    def _signs(self) -> dict[str, dict[str, _Signs]]:
        """By kind and corner; drawn when the first picture is read."""
        made: dict[str, dict[str, _Signs]] = {"weather": {}, "battery": {}}
        for corner in CORNERS:
            other = next(name for name in CORNERS if name != corner)
            icon = functools.partial(dataclasses.replace, _BLANK, weather_pos=corner, battery_pos=other)
            text = functools.partial(dataclasses.replace, _BLANK, weather_pos=other, battery_pos=corner)
            made["weather"][corner] = self._drawn(corner, "weather", {w: icon(weather=w) for w in WEATHERS})
            made["battery"][corner] = self._drawn(corner, "battery", {b: text(battery=b) for b in range(101)})
        return made

    def _drawn(self, corner: str, kind: str, watches: dict[Any, Watch]) -> _Signs:
        x, y = CORNERS[corner]
        x0, y0, x1, y1 = BOXES[kind]
        low = [max(0, math.floor(edge * self.scale)) for edge in (y + y0, x + x0)]
        high = [min(self.crop.size, math.ceil(edge * self.scale)) for edge in (y + y1, x + x1)]
        box = (slice(low[0], high[0]), slice(low[1], high[1]))
        pictures = [self.crop(render(watch)).astype(np.float32)[box] for watch in watches.values()]
        sharp = np.stack([self._fine(picture, kind) for picture in pictures])
        lengths, directions = np.linalg.norm(sharp, axis=1), []
        for softness in SOFT:
            drawn = np.stack([self._fine(self._blurred(picture, softness), kind) for picture in pictures])
            directions.append(drawn / np.linalg.norm(drawn, axis=1)[:, None])
        return _Signs(
            box, tuple(watches) * len(SOFT), np.concatenate(directions).astype(np.float32), np.tile(lengths, len(SOFT))
        )

    def _fine(self, patch: np.ndarray, kind: str) -> np.ndarray:
        return (patch - self._blurred(patch, COARSE[kind])).reshape(-1)

    def _blurred(self, patch: np.ndarray, sigma: float) -> np.ndarray:
        sigma *= self.scale
        return ndimage.gaussian_filter(patch, (sigma, sigma, 0), mode="nearest")

    def _time(self, pixels: np.ndarray) -> tuple[int | None, int | None, int | None]:
        face = np.median(pixels[self._face], axis=0)
        towards = np.asarray(WHITE, np.float32) - face
        if towards @ towards < 3 * CONTRAST**2:
            return None, None, None
        whiteness = (pixels - face) @ towards / (towards @ towards)
        known: dict[str, int] = {}
        for hand, inside in self._rings.items():
            value = self._hand(whiteness[inside], hand, known)
            if value is not None:
                known[hand] = value
        return known.get("hour"), known.get("minute"), known.get("second")

    def _hand(self, seen: np.ndarray, hand: str, known: dict[str, int]) -> int | None:
        angles = [(value, 0) for value in range(60)]
        if hand == "hour":  # without a minute it may point anywhere in its hour
            minutes = (known["minute"],) if "minute" in known else range(0, 60, 5)
            angles = [(hour, minute) for hour in range(12) for minute in minutes]
        beside = tuple(known.items())
        drawn = np.stack([self._mask(hand, *angle, beside)[self._rings[hand]] for angle in angles])
        along, lengths = drawn @ seen, np.linalg.norm(drawn, axis=1)
        k = int((along / lengths).argmax())
        there = along[k] > COSINE * lengths[k] * np.linalg.norm(seen) and along[k] > GAIN * lengths[k] ** 2
        return angles[k][0] if there else None

    def _draw(self, hand: str, value: int, minute: int, beside: tuple[tuple[str, int], ...]) -> np.ndarray:
        """Float32 [S, S], 1 where a hand or one of those beside it is drawn."""
        shown = dict(beside) | {hand: value}
        time = {"hour": 0, "minute": minute, "second": 0} | shown
        ends = dict(zip((name for name, _, _ in HANDS), hand_ends(dataclasses.replace(_BLANK, **time))))
        canvas = Image.new("L", (SIZE, SIZE))
        for name, _, width in HANDS:
            if name in shown:
                ImageDraw.Draw(canvas).line([(CENTRE, CENTRE), ends[name]], fill=255, width=width)
        return self.crop(canvas.convert("RGB"))[..., 0].astype(np.float32) / 255


def true_watches(folder: str | Path) -> list[Watch]:
    """The watches of a folder of `smartwatch_files.generate`, number i of images/i.png; UserError if the reader cannot read such."""
    file = Path(folder) / "settings.json"
    try:
        settings = from_dict(WatchSet, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} does not say how smart-watches were drawn ({error}): give the folder they are in"
        ) from error
    if settings.material != "pure" or settings.material_alpha != 255 or set(settings.hands) != {WHITE}:
        raise UserError(f"{file}: only white hands on faces of one colour can be read back")
    return draw_all(settings)[0]


def survival(readings: Iterable[Reading], watches: Iterable[Watch]) -> dict[str, float]:
    """Share of watches that are read right: by fact, `time` (all three hands) and `all`; and their `count`."""
    right = [reading.right(watch) for reading, watch in zip(readings, watches, strict=True)]
    if not right:
        raise UserError("there are no watches to be read")
    shares = {fact: float(np.mean([one[fact] for one in right])) for fact in FACTS}
    shares["time"] = float(np.mean([one["hour"] and one["minute"] and one["second"] for one in right]))
    return {**shares, "all": float(np.mean([all(one.values()) for one in right])), "count": len(right)}
