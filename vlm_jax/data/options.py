"""What a run is trained on: the `data` part of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vlm_jax.config import ConfigError, at_least_one, one_of

ORDERS = ("packed", "modality_length", "shuffled")


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    path: LLaVA .json or .jsonl; tar shards or ArrayRecord files (a pattern such as shard-*.tar or shard-{000..012}.tar takes several,
    in order of name), or their folder; a TFDS folder (data.sources lists the kinds).
    image_folder: where relative image paths start; empty: data.image_folder. task: what is made of a record (data.tasks), empty: its
    own `task`, or understanding. flatten: "pairs" makes one sample of every question and answer, "original" with CLIP-FlanT5's
    defects. weight: share of the samples of an epoch, of all sources or of none (plain concatenation). repeat: passes in an epoch, 0
    leaves the source out. limit: at most so many records in a pass (0: all), the next ones in every pass. Only one of weight and
    repeat can be given.
    """

    path: str = ""
    image_folder: str = ""
    task: str = ""
    flatten: str = ""
    weight: float = 0.0
    repeat: int = 1
    limit: int = 0

    def __post_init__(self):
        one_of("data.sources.*.flatten", self.flatten, ("", "pairs", "original"))
        if self.weight < 0 or self.repeat < 0 or self.limit < 0:
            raise ConfigError(f"weight, repeat and limit of the source {self.path} must not be negative")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Records, text format and packing.

    path: files (see Source.path), concatenated: the short way to name sources that need nothing else. sources: name -> Source, in
    addition. image_folder: where relative image paths start. image_roots: beginning of an image path -> folder that takes its place,
    the longest that fits; for images that lie in several places. epoch_samples: samples in an epoch of a weighted mixture (0: as many
    as its records). tokenizer: directory; empty: that of the weights.

    template: conversation template. im_start_end: put <im_start>, <im_end> around images. keep_images: leave every <image> where it
    stands (None: only where a record has several). self_question: share of questions that v1_sq makes the model ask (SQ-LLaVA's
    sq_r). compat: "llava" for the labels of the original code, its defects included: LLaVA's, SQ-LLaVA's with v1_sq, LLaVAR's with
    llavar_*, and of task generation the unified model's rule that an <image> in the second turn is generated, whoever says it.

    order: "packed" fills rows of row_length slots with several samples; "modality_length" (LLaVA's group_by_modality_length) and
    "shuffled" put one sample in a row. views_per_row: images (views) per row. sample_length: longest sample in slots. answer_length:
    slots of a row for the decoder of an encoder-decoder model. max_samples: samples per row; 1 is unpacked, None as many as fit.
    shared_images: samples of a source with the same images come into one row and are encoded once (the questions of a flattened
    dialogue, say); views_per_row then counts an image once, however many samples of the row are about it.

    generated_watches: if positive, the sources are ignored and this many smart-watch images are drawn (task `generated_task`) under
    the output directory, with a tokenizer of bytes ("byte") or words ("word"), their faces of `generated_material` (pure, mesh, noise),
    their hands in one or three colours `generated_hands`. seed: order of the samples. cache: folder for measured
    lengths (empty: the output directory). pixel_cache: folder for resized images (empty: none). feature_cache: folder for the
    features of a frozen tower (empty: none). max_bad_share: share of a source's records that may be unusable before the run stops.
    threads: image readers per host. processes: workers that measure the data (0: threads).
    """

    path: tuple[str, ...] = ()
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    image_folder: str = ""
    image_roots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    epoch_samples: int = 0
    tokenizer: str = ""
    template: str = "v1"
    im_start_end: bool = False
    keep_images: bool | None = None
    self_question: float = 0.5
    compat: str = ""
    order: str = "packed"
    row_length: int = 4096
    views_per_row: int = 6
    sample_length: int = 2048
    answer_length: int = 1024
    max_samples: int | None = None
    shared_images: bool = False
    generated_watches: int = 0
    generated_task: str = "rounds"
    generated_tokenizer: str = "byte"
    generated_material: str = "pure"
    generated_hands: tuple[tuple[int, int, int], ...] = ((255, 255, 255),)
    seed: int = 0
    cache: str = ""
    pixel_cache: str = ""
    feature_cache: str = ""
    max_bad_share: float = 0.05
    threads: int = 8
    processes: int = 0

    def __post_init__(self):
        at_least_one("data", self, ("row_length", "views_per_row", "sample_length", "answer_length", "threads"))
        one_of("data.order", self.order, ORDERS)
        if self.shared_images and (self.order != "packed" or self.max_samples == 1):
            raise ConfigError(
                "data.shared_images needs several samples in a row: set data.order=packed and data.max_samples=None, or leave it out"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(
                f"data.max_bad_share={self.max_bad_share} must lie between 0 and 1: it is a share of the records"
            )
        if self.seed < 0 or self.epoch_samples < 0:
            raise ConfigError(f"data.seed={self.seed} and data.epoch_samples={self.epoch_samples} must not be negative")
