"""Which images a visual tokenizer is trained on, and what is cut out of them: the `data` part of its recipe."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ConfigError, at_least_one, one_of

CROPS = ("random_scale", "random_place", "random_area", "centre", "centre_box", "squash")  # see data.crops


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    """Images and their crop.

    path: folders (with all images below them), image files, .txt lists of files, tar shards, ArrayRecord shards of `data build`, or
    LLaVA .json and .jsonl files, whose images are taken; patterns such as shard-{000..012}.tar and *.png take several. image_folder:
    where relative paths in lists and records start (empty: the folder of the list).

    size: pixels per side. crop: the rule, see data.crops. flip: share of images that are mirrored.

    generated_watches: if positive, `path` is ignored and this many smart-watch images are drawn under the output directory. seed: of the
    order of the images and their crops. cache: folder for what is found out about shards (empty: the output directory). max_bad_share:
    share of the images that may be broken before the run stops. threads: image readers per host.
    """

    path: tuple[str, ...] = ()
    image_folder: str = ""
    size: int = 256
    crop: str = "random_scale"
    flip: float = 0.5
    generated_watches: int = 0
    seed: int = 0
    cache: str = ""
    max_bad_share: float = 0.05
    threads: int = 8

    def __post_init__(self):
        one_of("data.crop", self.crop, CROPS)
        at_least_one("data", self, ("size", "threads"))
        for key in ("flip", "max_bad_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"data.{key}={getattr(self, key)} must lie between 0 and 1: it is a share")
        if self.seed < 0 or self.generated_watches < 0:
            raise ConfigError(
                f"data.seed={self.seed} and data.generated_watches={self.generated_watches} must not be negative"
            )
