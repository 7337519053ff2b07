"""What a run is trained on: the `data` part of a recipe."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import at_least_one


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Records, text format and packing.

    path: LLaVA JSON or JSONL files, concatenated. image_folder: where relative image paths start. tokenizer: directory; empty: that
    of the weights. template: conversation template. im_start_end: put <im_start>, <im_end> around images. keep_images: leave every
    <image> where it stands (None: only where a record has several). compat: "llava" for the original masks.
    row_length: slots per row. views_per_row: images (views) per row. sample_length: longest sample in slots. max_samples: samples
    per row; 1 is unpacked, None as many as fit. generated_watches: if positive, `path` is ignored and this many smart-watch images
    are drawn (task `generated_task`) under the output directory, with a tokenizer of bytes ("byte") or words
    ("word"). seed: order of the samples. cache: folder for measured lengths (empty: the output directory). threads: image readers per
    host.
    """

    path: tuple[str, ...] = ()
    image_folder: str = ""
    tokenizer: str = ""
    template: str = "v1"
    im_start_end: bool = False
    keep_images: bool | None = None
    compat: str = ""
    row_length: int = 4096
    views_per_row: int = 6
    sample_length: int = 2048
    max_samples: int | None = None
    generated_watches: int = 0
    generated_task: str = "rounds"
    generated_tokenizer: str = "byte"
    seed: int = 0
    cache: str = ""
    threads: int = 8

    def __post_init__(self):
        at_least_one("data", self, ("row_length", "views_per_row", "sample_length", "threads"))
