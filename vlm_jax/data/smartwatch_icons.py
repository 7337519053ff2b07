"""Weather icons of the smart-watch pictures, drawn from polygons and ellipses: 30 x 30 RGBA, supersampled.

Every icon is drawn on a square of 4 x 30 pixels in coordinates of a unit square (x right, y down) and then reduced by
averaging 4 x 4 blocks, so that its edges and its alpha are smooth.
"""

from __future__ import annotations

import functools
import math

from PIL import Image, ImageDraw

from vlm_jax.config import one_of

SIZE = 30
SUPERSAMPLE = 4

SUN_YELLOW = (253, 202, 64, 255)
SUN_ORANGE = (247, 150, 20, 255)
PALE_CLOUD = (221, 221, 221, 255)
RAIN_CLOUD = (155, 155, 155, 255)
DROP_BLUE = (0, 110, 230, 255)

# (centre x, centre y, radius) of the puffs of a cloud that fills the unit square, and its flat foot (x0, y0, x1, y1).
CLOUD_PUFFS = ((0.20, 0.66, 0.20), (0.40, 0.42, 0.26), (0.66, 0.52, 0.24), (0.84, 0.68, 0.16))
CLOUD_FOOT = (0.18, 0.56, 0.86, 0.84)


class Pen:
    """Draws in unit coordinates on the enlarged canvas of one icon."""

    def __init__(self) -> None:
        self.scale = SIZE * SUPERSAMPLE
        self.canvas = Image.new("RGBA", (self.scale, self.scale), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.canvas)

    def disc(self, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
        """A filled circle."""
        box = [(x - radius, y - radius), (x + radius, y + radius)]
        self.draw.ellipse([(a * self.scale, b * self.scale) for a, b in box], fill=colour)

    def polygon(self, points: list[tuple[float, float]], colour: tuple[int, ...]) -> None:
        """A filled polygon."""
        self.draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=colour)

    def reduced(self) -> Image.Image:
        """The icon at its own size."""
        return self.canvas.reduce(SUPERSAMPLE)


def _star(x: float, y: float, outer: float, inner: float, points: int = 12) -> list[tuple[float, float]]:
    """Corners of a star with `points` rays around (x, y)."""
    corners = []
    for i in range(2 * points):
        radius = outer if i % 2 == 0 else inner
        angle = math.pi * i / points
        corners.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
    return corners


def _sun(pen: Pen, x: float, y: float, size: float) -> None:
    pen.polygon(_star(x, y, 0.5 * size, 0.34 * size), SUN_YELLOW)
    pen.disc(x, y, 0.28 * size, SUN_ORANGE)


def _cloud(pen: Pen, x: float, y: float, size: float, colour: tuple[int, ...]) -> None:
    """A cloud in the square of side `size` whose top-left corner is (x, y)."""
    for puff_x, puff_y, radius in CLOUD_PUFFS:
        pen.disc(x + puff_x * size, y + puff_y * size, radius * size, colour)
    x0, y0, x1, y1 = (size * c for c in CLOUD_FOOT)
    pen.polygon([(x + x0, y + y0), (x + x1, y + y0), (x + x1, y + y1), (x + x0, y + y1)], colour)


def _rain(pen: Pen) -> None:
    """Five slanted drops under a cloud."""
    for i, (x, y) in enumerate(((0.18, 0.74), (0.34, 0.84), (0.50, 0.74), (0.66, 0.84), (0.82, 0.74))):
        length = 0.16 if i % 2 == 0 else 0.14
        pen.polygon([(x, y), (x + 0.06, y), (x - 0.02, y + length), (x - 0.08, y + length)], DROP_BLUE)


@functools.cache
def icon(weather: str) -> Image.Image:
    """The icon of "sunny", "cloudy" or "raining": RGBA, 30 x 30."""
    one_of("weather", weather, ("sunny", "cloudy", "raining"))
    pen = Pen()
    if weather == "sunny":
        _sun(pen, 0.5, 0.5, 0.94)
    elif weather == "cloudy":
        _sun(pen, 0.30, 0.30, 0.56)
        _cloud(pen, 0.06, 0.14, 0.90, PALE_CLOUD)
    else:
        _cloud(pen, 0.08, -0.06, 0.86, RAIN_CLOUD)
        _rain(pen)
    return pen.reduced()
