"""The `data` part of a recipe, opened: files -> records -> rows of slots."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from vlm_jax.config import ConfigError, VLMConfig
from vlm_jax.data.manifest import fingerprint
from vlm_jax.data.options import DataConfig
from vlm_jax.data.pipeline import Packing, Rows
from vlm_jax.data.records import Record, Records
from vlm_jax.data.tasks import TextFormat
from vlm_jax.data.templates import template
from vlm_jax.data.tokenizer import Tokenizer


class Concatenated(Sequence[Record]):
    """Several record files, one after another."""

    def __init__(self, parts: Sequence[Records]):
        self.parts = parts
        self._ends = list(accumulate(len(p) for p in parts))

    @property
    def fingerprint(self) -> str:
        """Hash of the content of every file."""
        return hashlib.sha256("\0".join(str(fingerprint(p)) for p in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} records, there is no number {index}")
        part = bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


def open_rows(
    data: DataConfig, model: VLMConfig, tokenizer: Tokenizer, *, epochs: int, max_bad: int, cache: Path
) -> Rows:
    """Rows of `epochs` passes over the files of `data`, in the order that data.seed draws."""
    if not data.path:
        raise ConfigError("data.path is empty: give LLaVA JSON files, e.g. --config.data.path=\"('train.json',)\"")
    records = Concatenated([Records(p, data.image_folder or None) for p in data.path])
    encode = TextFormat(
        tokenizer,
        template(data.template),
        compat=data.compat,
        start_end=data.im_start_end,
        keep_images=data.keep_images,
    )
    how = Packing(
        row_length=data.row_length,
        view_budget=data.views_per_row,
        sample_length=data.sample_length,
        max_samples=data.max_samples,
        seed=data.seed,
        epochs=epochs,
        max_bad=max_bad,
    )
    return Rows(records, encode, model, how, data.cache or cache, threads=data.threads)
