"""What of an image is turned into codes: one view by a rule of `data.crops` without chance, or several views of it.

    centre_box, centre, squash   one view, see data.crops
    pad                          centred on a grey square, resized bilinearly                       tower of unified models
    mirrored                     centre_box, and its mirror image                                   LlamaGen
    ten                          centre_box at `margin` times the size; its corners and centre, and those of its mirror image  LlamaGen

The ten views are in torchvision's order: top left, top right, bottom left, bottom right, centre, then the same of the mirror image.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from vlm_jax.config import ConfigError, at_least_one, one_of
from vlm_jax.data.crops import Crop
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.images import LONGEST_PADDED, open_image

OWN_CROPS = {"llamagen": "centre_box", "taming": "centre"}  # of the original programs' codes, by TokenizerConfig.names
COUNTS = {"centre_box": 1, "centre": 1, "squash": 1, "pad": 1, "mirrored": 2, "ten": 10}
GREY = (127, 127, 127)


@dataclasses.dataclass(frozen=True)
class Views:
    """A rule of the module's table for `size` pixels; margin: of the rule ten."""

    rule: str = "centre_box"
    size: int = 256
    margin: float = 1.1

    def __post_init__(self):
        one_of("--crop", self.rule, tuple(COUNTS))
        at_least_one("--", self, ("size",))
        if self.rule == "ten" and not 1 <= self.margin < 2:
            raise ConfigError(
                f"--margin={self.margin} must be at least 1 and below 2: the ten views are cut out of what it gives"
            )

    @property
    def count(self) -> int:
        """Views of an image."""
        return COUNTS[self.rule]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 [V, S, S, 3] of an RGB image; ValueError if it is too thin to be resized."""
        if self.rule == "ten":
            large = Crop(int(self.size * self.margin), "centre_box")(image)
            return np.stack([view for picture in (large, large[:, ::-1]) for view in self._five(picture)])
        if self.rule == "mirrored":
            view = Crop(self.size, "centre_box")(image)
            return np.stack([view, view[:, ::-1]])
        return (self._pad(image) if self.rule == "pad" else Crop(self.size, self.rule)(image))[None]

    def load(self, source: ImageSource) -> tuple[np.ndarray, tuple[int, int]]:
        """(views, (width, height)) of an image file; ImageError in one sentence."""
        image = open_image(source)
        try:
            return self(image), image.size
        except (ValueError, MemoryError) as error:
            raise ImageError(f"{source.label} cannot be resized: {error}", "too_thin") from error

    def _five(self, picture: np.ndarray) -> list[np.ndarray]:
        free, s = len(picture) - self.size, self.size
        middle = round(free / 2)
        places = (0, 0), (0, free), (free, 0), (free, free), (middle, middle)
        return [picture[top : top + s, left : left + s] for top, left in places]

    def _pad(self, image: Image.Image) -> np.ndarray:
        (w, h), side = image.size, max(image.size)
        if side > LONGEST_PADDED:
            raise ValueError(f"{w}x{h} pixels is too long to be padded to a square")
        square = Image.new("RGB", (side, side), GREY)
        square.paste(image, ((side - w) // 2, (side - h) // 2))
        return np.asarray(square.resize((self.size, self.size), Image.Resampling.BILINEAR))
