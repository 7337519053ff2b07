"""Which codes a prior is trained on, or images that become codes while it trains, and what they are of: the `data` part of its recipe."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ConfigError, at_least_one, one_of
from vlm_jax.data.image_options import CROPS

CUTS = (*CROPS, "pad", "mirrored", "ten")  # see data.crops, data.code_views


@dataclasses.dataclass(frozen=True)
class CodeDataConfig:
    """Codes of images, or images, and the class or caption of each.

    codes: what `tokenize` wrote; several are of the same images (cut otherwise), of which one is drawn each time. An image with
    several views shows one of them each time.

    path: in place of codes, images that init.tokenizer encodes at every step, anew each time; path and image_folder are those of
    data.image_options. crop: what is cut out, as large as prior.grid asks for: a rule of data.crops, or of data.code_views, of whose
    views one is drawn (margin: of its rule ten); empty: the rule of `tokenize`. flip: share of the images that are mirrored then.

    labels: a JSON file {image or folder: number of its class}; empty: the folders that the images lie in, numbered by name.
    captions: folder with the features of captions, one .npy [n, C] per image, called like the image. short_captions: another one,
    used for a share `short_share` of the images that it knows.

    generated: if positive, the above is ignored and codes of so many images, with a path images, are made up under the output
    directory. seed: of the order, and of what is drawn. max_bad_share: share of the images that may be broken or lack a caption before
    the run stops. threads: readers per host.
    """

    codes: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    image_folder: str = ""
    crop: str = ""
    margin: float = 1.1
    flip: float = 0.0
    labels: str = ""
    captions: str = ""
    short_captions: str = ""
    short_share: float = 0.3
    generated: int = 0
    seed: int = 0
    max_bad_share: float = 0.05
    threads: int = 4

    def __post_init__(self):
        at_least_one("data", self, ("threads",))
        if self.crop:
            one_of("data.crop", self.crop, CUTS)
        if not 1 <= self.margin < 2:
            raise ConfigError(
                f"data.margin={self.margin} must be at least 1 and below 2: ten views are cut out of what it gives"
            )
        if self.codes and self.path:
            raise ConfigError(
                "data.codes and data.path are both given: codes come from a file or from images, leave one of them empty"
            )
        for key in ("short_share", "max_bad_share", "flip"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"data.{key}={getattr(self, key)} must lie between 0 and 1: it is a share")
        if self.seed < 0 or self.generated < 0:
            raise ConfigError(f"data.seed={self.seed} and data.generated={self.generated} must not be negative")
