"""Which codes a prior is trained on, and what they are of: the `data` part of its recipe."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import ConfigError, at_least_one


@dataclasses.dataclass(frozen=True)
class CodeDataConfig:
    """Codes of images, and the class or caption of each.

    codes: what `tokenize` wrote; several are of the same images (cut otherwise), of which one is drawn each time. An image with
    several views shows one of them each time.

    labels: a JSON file {image or folder: number of its class}; empty: the folders that the images lie in, numbered by name.
    captions: folder with the features of captions, one .npy [n, C] per image, called like the image. short_captions: another one,
    used for a share `short_share` of the images that it knows.

    generated: if positive, the above is ignored and codes of so many images are made up under the output directory. seed: of the
    order, and of what is drawn. max_bad_share: share of the images that may lack a caption before the run stops. threads: readers per
    host.
    """

    codes: tuple[str, ...] = ()
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
        for key in ("short_share", "max_bad_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"data.{key}={getattr(self, key)} must lie between 0 and 1: it is a share")
        if self.seed < 0 or self.generated < 0:
            raise ConfigError(f"data.seed={self.seed} and data.generated={self.generated} must not be negative")
