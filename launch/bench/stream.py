"""What the referees measure with: models of four sizes with random weights, and a stream of samples like LLaVA's mix.

    lengths    text as in packing.py (mix665k), divided by `shrink`; an image takes as many slots as the model's views have features
    labels     on the last 60 % of the text
    images     JPEGs of one size, made like photographs (images.py)
Both sides of a bench read the same token ids and the same files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from images import photograph
from packing import IMAGE_SLOTS, LONGEST, lengths_and_views

from vlm_jax.config import IGNORE, IMAGE, LLMConfig, VisionConfig, VLMConfig
from vlm_jax.data.tasks import Sample

BOS, IMAGE_TOKEN, FIRST_WORD = 1, 3, 4  # ids; text is drawn from FIRST_WORD on
PROMPT_SHARE = 0.4
WINDOW = 512  # samples that are planned at least; the first rows of few would be less full than those of an epoch


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its rows: slots and views of a packed row; texts are `shrink` times shorter than mix665k's; picture: (w, h)."""

    model: VLMConfig
    slots: int
    shrink: int
    picture: tuple[int, int] = (640, 480)
    views: int = 6

    @property
    def longest(self) -> int:
        """Slots of a sample at most."""
        return LONGEST // self.shrink


def _llama(vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> LLMConfig:
    return LLMConfig(vocab, width, mlp, layers, heads, kv_heads, width // heads)


SIZES = {
    "tiny": Size(
        VLMConfig(VisionConfig("clip", 84, 14, 32, 3, 2, 64), llm=_llama(512, 64, 176, 2, 4, 4), aspect="square"),
        256, 16, (120, 80),
    ),
    "small": Size(
        VLMConfig(VisionConfig("clip", 168, 14, 256, 6, 4, 1024), llm=_llama(4096, 512, 1376, 8, 8, 8), aspect="square"),
        1024, 4, (320, 240),
    ),
    "1b": Size(VLMConfig(llm=_llama(32000, 2048, 5632, 22, 32, 4), aspect="square"), 4096, 1),
    "7b": Size(VLMConfig(aspect="square"), 4096, 1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A sample before its image is read: ids with IMAGE where it stands, labels, the image's file or None. length: its slots."""

    tokens: np.ndarray
    labels: np.ndarray
    image: str | None
    length: int

    def sample(self) -> Sample:
        """As our pipeline takes it."""
        return Sample(self.tokens, self.labels, (self.image,) if self.image else ())


def text_and_views(size: Size, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(text slots, image views) of `count` samples."""
    lengths, views = lengths_and_views(count)
    texts = np.maximum((lengths - IMAGE_SLOTS * views) // size.shrink, 8)
    return np.minimum(texts, size.longest - size.model.vision.features * views), views


def draw(size: Size, count: int, folder: Path, equal: int = 0) -> list[Drawn]:
    """`count` samples; equal: slots of every one, each with an image, in place of drawn lengths. The images lie in `folder`."""
    rng = np.random.default_rng(0)
    texts, views = text_and_views(size, count)
    if equal:
        texts, views = np.full(count, equal - size.model.vision.features), np.ones(count, np.int64)
    return [_one(rng, size, int(n), bool(v), folder / f"{i}.jpg") for i, (n, v) in enumerate(zip(texts, views))]


def _one(rng: np.random.Generator, size: Size, text: int, shown: bool, path: Path) -> Drawn:
    words = rng.integers(FIRST_WORD, size.model.llm.vocab, text - 1)
    tokens = np.array([BOS, *([IMAGE] * shown), *words], np.int32)
    labels = np.where(np.arange(len(tokens)) >= len(tokens) - int(text * (1 - PROMPT_SHARE)), tokens, IGNORE)
    if shown and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(int(path.stem), *size.picture))
    length = len(tokens) + (size.model.vision.features - 1) * shown
    return Drawn(tokens, labels.astype(np.int32), str(path) if shown else None, length)


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides of train.py are told. rows: of an update of packed rows; equal: slots of the samples of equal length, `rows`
    * slots / equal of which make an update. rank: of LoRA."""

    size: str = "small"
    mode: str = "full"
    dtype: str = "float32"
    rows: int = 4
    updates: int = 2
    rank: int = 128
    equal: int = 0
    threads: int = 2

    @property
    def shape(self) -> Size:
        """Model and rows."""
        return SIZES[self.size]

    def samples_of(self, kind: str, folder: Path) -> list[Drawn]:
        """The samples of "mixed" or "equal" rows."""
        slots = self.rows * self.updates * self.shape.slots
        if kind == "equal":
            return draw(self.shape, slots // self.equal, folder / "equal", self.equal)
        texts, views = text_and_views(self.shape, 4096)
        mean = (texts + views * self.shape.model.vision.features).mean()
        return draw(self.shape, max(int(2 * slots / mean), WINDOW), folder / "mixed")


@dataclasses.dataclass(frozen=True)
class AnswerCase:
    """What both sides of decode.py and eval_throughput.py are told. ends: one in `ends` ids ends an answer (0: none does)."""

    size: str = "small"
    dtype: str = "float32"
    ends: int = 0
    threads: int = 2

    @property
    def shape(self) -> Size:
        """The model."""
        return SIZES[self.size]

    @property
    def eos(self) -> list[int]:
        """Ids that end an answer: with random weights all ids are alike likely, so that lengths of answers are like throws of a die."""
        vocab = self.shape.model.llm.vocab
        return list(range(FIRST_WORD, vocab, self.ends)) if self.ends else []

    def questions(self, texts: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids with IMAGE, views uint8 [1, S, S, 3]) of questions with `texts` text tokens."""
        side, rng = self.shape.model.vision.image_size, np.random.default_rng(0)
        words = [rng.integers(FIRST_WORD, self.shape.model.llm.vocab, n - 1) for n in texts]
        views = [rng.integers(0, 256, (1, side, side, 3), np.uint8) for _ in texts]
        return [(np.array([BOS, IMAGE, *some]), view) for some, view in zip(words, views)]
