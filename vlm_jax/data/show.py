"""Samples as the model reads them: every token with what becomes of it, the images after pad or crop, and how samples share a row.

    tokens   1       3148 1001 29901   -200               ...  319         6635        2
    kind     masked  masked            image (576 slots)  ...  supervised  supervised  supervised
    text     <s>     US   ER   :       cat.jpg            ...  A           cat         </s>

What is found here is drawn as a page by `data.show_page`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import GENERATED, IGNORE, IMAGE, ConfigError
from vlm_jax.data import packing
from vlm_jax.data.draws import Draws
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import open_image
from vlm_jax.data.manifest import Layout, name_of, sources_of
from vlm_jax.data.options import DataConfig
from vlm_jax.data.pipeline import Load
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.models.slots import slots_of_image

POOL = 64  # random samples that are packed to show what a row looks like

Runs = tuple[tuple[str, int], ...]  # (kind, slots), one after another


class Sizes(NamedTuple):
    """What a sample takes in a row."""

    slots: int
    views: int
    answers: int = 0


@dataclasses.dataclass(frozen=True)
class Token:
    """One token: the text it adds, its kind (masked, supervised, image, generated or cut) and the slots it takes."""

    text: str
    id: int
    kind: str
    special: bool = False
    slots: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of a sample: file name, (width, height) in the file, views uint8 [V, S, S, 3], slots (0: it is to be generated)."""

    name: str
    size: tuple[int, int]
    views: np.ndarray
    slots: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """Record `index` of `source`: tokens as the model (or its encoder) reads them, `answer` what a decoder has to say (else None)."""

    source: str
    index: int
    where: str
    task: str
    tokens: tuple[Token, ...]
    answer: tuple[Token, ...] | None
    pictures: tuple[Picture, ...]
    views: int

    @property
    def sizes(self) -> Sizes:
        """What the sample takes in a row."""
        slots, answers = (sum(n for _, n in runs(tokens or ())) for tokens in (self.tokens, self.answer))
        return Sizes(slots, self.views, answers)

    @property
    def supervised(self) -> int:
        """Tokens with loss."""
        return sum(token.kind == "supervised" for token in (*self.tokens, *(self.answer or ())))

    @property
    def cut(self) -> int:
        """Tokens behind the end of the longest sample."""
        return sum(token.kind == "cut" for token in (*self.tokens, *(self.answer or ())))


@dataclasses.dataclass(frozen=True)
class Strip:
    """A row: (number of the shown sample, 0 for another one; its slots by kind), the slots of the row, and whose row it is."""

    pieces: tuple[tuple[int, Runs], ...]
    length: int
    side: str = ""

    @property
    def filled(self) -> float:
        """Share of the slots that samples take."""
        return sum(slots for _, runs in self.pieces for _, slots in runs) / self.length


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads a record as training does in epoch 0, images included."""

    layout: Layout
    tokenizer: Tokenizer
    load: Load
    seed: int = 0

    def __call__(self, record: Any, index: int, source: str) -> Shown:
        """The sample of `record`, number `index` of its source; UserError in one sentence if it cannot be trained on."""
        name = name_of(record, index)
        sample = self.layout.encode(record, Draws(self.seed, 0, index))
        images = sources_of(sample, name)
        loaded = [self.load(image) for image in images]
        placed, count, views = self.layout.place(sample, [size for _, size in loaded], name)
        takes = [len(slots_of_image(*size, self.layout.config)) for _, size in loaded]
        pictures = [
            Picture(file_name(image), size, pixels, slots)
            for image, (pixels, size), slots in zip(images, loaded, takes, strict=True)
        ]
        for image in sample.generated:
            wanted = open_image(ImageSource.of(image, name))
            small = wanted.copy()
            small.thumbnail((self.layout.config.vision.image_size,) * 2)
            pictures.append(Picture(file_name(ImageSource.of(image)), wanted.size, np.asarray(small)[None], 0))
        tokens = self._tokens(sample.tokens, sample.labels, takes, len(placed))
        answer = None
        if sample.answer is not None:
            answer = self._tokens(sample.answer, sample.answer, [], len(placed.answer))
        return Shown(source, index, name, record.task or "understanding", tokens, answer, tuple(pictures), views)

    def measure(self, record: Any, index: int) -> Sizes:
        """What a record takes in a row, from the headers of its images; UserError if it cannot be trained on."""
        name = name_of(record, index)
        sample = self.layout.encode(record, Draws(self.seed, 0, index))
        placed, _, views = self.layout.place(sample, self.layout.sizes(sources_of(sample, name)), name)
        return Sizes(len(placed), views, 0 if placed.answer is None else len(placed.answer))

    def _tokens(self, ids: np.ndarray, labels: np.ndarray, takes: Sequence[int], room: int) -> tuple[Token, ...]:
        special = {token.id for token in self.tokenizer.model.added if token.special}
        images, out, used = iter(takes), [], 0
        for token, label, text in zip(ids.tolist(), labels.tolist(), token_texts(self.tokenizer, ids), strict=True):
            slots = next(images) if token == IMAGE else 1
            used += slots
            kind = "supervised" if label != IGNORE else "masked"
            kind = {IMAGE: "image", GENERATED: "generated"}.get(token, kind) if used <= room else "cut"
            out.append(Token(text, token, kind, token in special, slots))
        return tuple(out)


def file_name(image: ImageSource) -> str:
    """The last part of an image's name."""
    return (image.member or image.path).replace("\\", "/").rsplit("/", 1)[-1]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each id adds, special tokens by name, "" for images and for all but the last piece of a character.

    Joined they are the text without its images.
    """
    names = {token.id: token.text for token in tokenizer.model.added}
    texts, run = [], []
    for token in [*map(int, ids), None]:
        if token is not None and token >= 0 and token not in names:
            run.append(token)
            continue
        texts += _added(tokenizer, run)
        run = []
        if token is not None:
            texts.append(names.get(token, ""))
    return texts


def _added(tokenizer: Tokenizer, run: list[int]) -> list[str]:
    """What each id of a run of ordinary ones adds; a piece of an unfinished character waits for the rest."""
    texts = list(tokenizer.stream(run))
    return [*texts[: len(run) - 1], "".join(texts[len(run) - 1 :])] if run else []


def drawn(sources: Mapping[str, Sequence[Any]], seed: int) -> Iterator[tuple[str, int]]:
    """(source, record number) of every record once: the sources in turn, random inside each."""
    orders = [zip(itertools.repeat(name), packing.permutation(len(r), seed, 0)) for name, r in sources.items()]
    for turn in itertools.zip_longest(*orders):
        yield from ((name, int(index)) for name, index in filter(None, turn))


def choose(sources: Mapping[str, Sequence[Any]], read: Reader, count: int, seed: int) -> tuple[list[Shown], list[str]]:
    """`count` random samples, and a sentence for each record that was drawn and cannot be used (at most ten times `count`)."""
    shown, skipped = [], []
    for name, index in drawn(sources, seed):
        if len(shown) == count or len(skipped) == 10 * count:
            break
        found = _or_sentence(lambda: read(sources[name][index], index, name))
        (skipped if isinstance(found, str) else shown).append(found)
    return shown, skipped


def rows(sources: Mapping[str, Sequence[Any]], read: Reader, shown: Sequence[Shown], data: DataConfig) -> list[Strip]:
    """The rows that the shown samples come to lie in when they are packed with POOL random others."""
    sizes, known = [one.sizes for one in shown], {(one.source, one.index) for one in shown}
    others = (found for found in drawn(sources, data.seed + 1) if found not in known)
    for name, index in itertools.islice(others, POOL):
        found = _or_sentence(lambda: read.measure(sources[name][index], index))
        if not isinstance(found, str):
            sizes.append(found)
    slots, views, answers = np.asarray(sizes, np.int32).reshape(-1, 3).T
    most, has_answers = data.max_samples if data.order == "packed" else 1, bool(answers.any())
    limits = data.row_length, data.views_per_row, data.seed, 0
    reserved = {"answers": answers, "answer_length": data.answer_length} if has_answers else {}
    plan = packing.plan(slots, views, *limits, max_samples=most, **reserved)
    strips = []
    for samples in (plan[row].tolist() for row in range(len(plan))):
        if min(samples) < len(shown):
            strips.append(_strip(samples, shown, sizes, data.row_length, "encoder" if has_answers else ""))
            if has_answers:
                strips.append(_strip(samples, shown, sizes, data.answer_length, "decoder"))
    return strips


def _strip(samples: Sequence[int], shown: Sequence[Shown], sizes: Sequence[Sizes], length: int, side: str) -> Strip:
    pieces = []
    for k in samples:
        if k < len(shown):
            pieces.append((k + 1, runs((shown[k].answer if side == "decoder" else shown[k].tokens) or ())))
        else:
            pieces.append((0, (("other", sizes[k].answers if side == "decoder" else sizes[k].slots),)))
    return Strip(tuple(pieces), length, side)


def runs(tokens: Sequence[Token]) -> Runs:
    """Slots of consecutive tokens of one kind, in order; what is cut away takes none."""
    kept = (token for token in tokens if token.kind != "cut")
    grouped = itertools.groupby(kept, key=lambda token: token.kind)
    return tuple((kind, sum(token.slots for token in group)) for kind, group in grouped)


def _or_sentence(read: Callable[[], Any]) -> Any:
    """What `read` gives, or why it cannot."""
    try:
        return read()
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        return str(error)
