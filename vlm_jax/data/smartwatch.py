"""Smart-watch pictures and their conversations: one watch is nine attributes, one picture and a few questions.

Layout of a picture (224 x 224 RGB, white), after the data set of arXiv 2505.23043:

    corner A   weather icon (30 x 30)          centre (112, 112), face radius 89
    corner B   battery: outline, bar, "62%"    hands: hour 0.5 R, minute 0.7 R, second 0.9 R

Everything follows from one integer seed: attributes and texts are drawn from `random.Random(seed)` in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from vlm_jax.config import UserError, one_of
from vlm_jax.data import smartwatch_icons

SIZE = 224
CENTRE = 112
RADIUS = 89
CORNERS = {"top-left": (10, 10), "top-right": (174, 10), "bottom-left": (10, 194), "bottom-right": (174, 194)}
WEATHERS = ("sunny", "cloudy", "raining")
MATERIALS = ("pure", "mesh", "noise")
HANDS = (("hour", 0.5, 6), ("minute", 0.7, 4), ("second", 0.9, 2))  # name, length in radii, width in pixels
MESH_STEP = 5
NOISE_LEVELS = 20
WHITE = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Watch:
    """All attributes of one watch; colours are RGB in 0..255, battery in percent, positions name a corner."""

    hour: int
    minute: int
    second: int
    material_color: tuple[int, int, int]
    weather: str
    battery: int
    weather_pos: str
    battery_pos: str
    hour_color: tuple[int, int, int] = WHITE
    minute_color: tuple[int, int, int] = WHITE
    second_color: tuple[int, int, int] = WHITE
    material: str = "pure"
    material_alpha: int = 255

    @property
    def time(self) -> str:
        return f"{self.hour:02d}:{self.minute:02d}:{self.second:02d}"


def sample_watch(rng: random.Random) -> Watch:
    """Draws the attributes in the order of the published generator (hours 0 and 12 both occur)."""
    hour, minute, second = rng.randint(0, 12), rng.randint(0, 59), rng.randint(0, 59)
    colour = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
    weather, battery = rng.choice(WEATHERS), rng.randint(0, 100)
    weather_pos, battery_pos = rng.sample(list(CORNERS), 2)
    return Watch(hour, minute, second, colour, weather, battery, weather_pos, battery_pos)


def hand_ends(watch: Watch) -> list[tuple[float, float]]:
    """End points (x, y) in pixels of the hour, minute and second hand.

    The hour hand moves with the minutes, the minute hand does not move with the seconds.
    """
    degrees = ((watch.hour % 12 + watch.minute / 60) * 30 - 90, watch.minute * 6 - 90, watch.second * 6 - 90)
    ends = []
    for (_, length, _), degree in zip(HANDS, degrees):
        angle = math.radians(degree)
        ends.append((CENTRE + length * RADIUS * math.cos(angle), CENTRE + length * RADIUS * math.sin(angle)))
    return ends


@functools.cache
def battery_font() -> ImageFont.FreeTypeFont:
    """Pillow's built-in Aileron Regular at size 10; only a Pillow with FreeType (from 10.1 on) has it."""
    if not features.check("freetype2"):
        raise UserError(
            "the battery text needs Pillow with FreeType: reinstall it with `pip install --force-reinstall pillow`"
        )
    return ImageFont.load_default(size=10)


@functools.cache
def _face_mask() -> Image.Image:
    mask = Image.new("L", (SIZE, SIZE), 0)
    box = [CENTRE - RADIUS, CENTRE - RADIUS, CENTRE + RADIUS, CENTRE + RADIUS]
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def _material(watch: Watch, seed: int) -> Image.Image:
    """The face's material on the whole canvas: RGBA, alpha 255."""
    one_of("material", watch.material, MATERIALS)
    if watch.material == "pure":
        return Image.new("RGBA", (SIZE, SIZE), (*watch.material_color, 255))
    colour = np.array(watch.material_color, np.int32)
    if watch.material == "mesh":
        pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
        pixels[::MESH_STEP] = colour
        pixels[:, ::MESH_STEP] = colour
    else:
        # Clipped before the cast: bright colours saturate and do not wrap around to black.
        noise = np.random.default_rng(seed).integers(0, NOISE_LEVELS, (SIZE, SIZE, 3))
        pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGBA")


def _draw_battery(canvas: Image.Image, watch: Watch) -> None:
    draw = ImageDraw.Draw(canvas)
    x, y = CORNERS[watch.battery_pos]
    draw.rectangle([x, y, x + 25, y + 10], outline="black", width=1)
    draw.rectangle([x + 2, y + 2, x + 2 + int(23 * watch.battery / 100), y + 8], fill="green")
    draw.text((x + 30, y), f"{watch.battery}%", fill="black", font=battery_font())


def render(watch: Watch, seed: int = 0) -> Image.Image:
    """The picture of a watch: RGB, 224 x 224. `seed` matters for the material "noise" alone."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (*WHITE, 255))
    alpha = _face_mask().point(lambda value: int(value * watch.material_alpha / 255))
    canvas.paste(_material(watch, seed), (0, 0), alpha)
    draw = ImageDraw.Draw(canvas)
    for (name, _, width), end in zip(HANDS, hand_ends(watch)):
        draw.line([(CENTRE, CENTRE), end], fill=(*getattr(watch, f"{name}_color"), 255), width=width)
    icon = smartwatch_icons.icon(watch.weather)
    canvas.paste(icon, CORNERS[watch.weather_pos], icon)
    _draw_battery(canvas, watch)
    return canvas.convert("RGB")
