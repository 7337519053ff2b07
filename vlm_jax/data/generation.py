"""Images that the assistant draws: captions become requests, and `<image>` in an answer becomes a target.

    record  human  Please show a image of the following: Two dogs.        gpt  The image is generated. \\n<image>
    tokens  ... The image is generated . \\n  529 3027 29958  -300  2     `<image>` is said as text, then the image follows
    labels  ... The image is generated . \\n  529 3027 29958  -100  2     its P slots have a loss of their own in the model

Who says `<image>` decides: a human shows an image, the assistant generates one; both may happen in one dialogue.
`compat="llava"` is the rule of the unified model's code, LLaVA's preprocess with generation: an `<image>` in the second turn of a
record means that all its images are generated, whoever says them, also where that turn is a question. A dialogue that
is too long gives up the end of its caption, never the image.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from vlm_jax.config import GENERATED, IGNORE, IMAGE
from vlm_jax.data.draws import Draws
from vlm_jax.data.records import Record, RecordError, Turn
from vlm_jax.data.tasks import (
    Sample,
    TextFormat,
    check_images,
    encode_dialogue,
    place_images,
    template_errors,
    training_pieces,
)
from vlm_jax.data.templates import IMAGE_TEXT
from vlm_jax.data.tokenizer import Tokenizer

REQUESTS = (
    "Can you generate a image of the following:",
    "Can you draw a image of the following:",
    "Please show a image of the following:",
)
REPLIES = (
    f"Sure, here is the image. \n{IMAGE_TEXT}",
    f"The image is shown as you wish. \n{IMAGE_TEXT}",
    f"The image is generated. \n{IMAGE_TEXT}",
)


@dataclasses.dataclass(frozen=True)
class Generation:
    """How dialogues with images in their answers become samples: a callable Record -> Sample.

    slots: P of an image that is generated. limit: slots of a sample (None: any number); captions are shortened so that the last
    generated image and the token behind it fit.
    """

    form: TextFormat
    slots: int = 1
    limit: int | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes tokens or labels."""
        mark = f"generation {self.slots} {self.limit} {self.form.fingerprint}"
        return hashlib.sha256(mark.encode()).hexdigest()

    def __call__(self, record: Record, draws: Draws | None = None) -> Sample:
        """RecordError names the record if its text or images do not fit. Nothing is drawn."""
        sample = self._sample(record, record.turns)
        return sample if self._fits(sample) else self._shortened(record)

    def _sample(self, record: Record, turns: Sequence[Turn]) -> Sample:
        with template_errors(record):
            placed = self._placed(turns) if record.images else turns
            tokens, labels = encode_dialogue(placed, self.form, bool(record.images))
            speakers = self._generates(turns, placed) if record.images else []
        at = np.flatnonzero(tokens == IMAGE)
        check_images(record, len(at), len(record.images))
        said = announcement(self.form.tokenizer)
        generated = [image for image, drawn in zip(record.images, speakers) if drawn]
        shown = [image for image, drawn in zip(record.images, speakers) if not drawn]
        for k in reversed(np.flatnonzero(speakers)):
            tokens, labels = (
                np.concatenate([array[: at[k]], said, [mark], array[at[k] + 1 :]]).astype(np.int32)
                for array, mark in ((tokens, GENERATED), (labels, IGNORE))
            )
        return Sample(tokens, labels, tuple(shown), tuple(generated))

    def _placed(self, turns: Sequence[Turn]) -> list[Turn]:
        """Images of questions stay where they are unless keep_images is False; those of answers always do."""
        form, placed = self.form, []
        for turn in turns:
            if turn[0] == "gpt":
                placed.append(turn)
            else:
                placed += place_images([turn], form.template, form.start_end, form.keep_images is not False)
        return placed

    def _generates(self, turns: Sequence[Turn], placed: Sequence[Turn]) -> list[bool]:
        """For every `<image>` that is trained on, in order: is it generated?"""
        parts = training_pieces(self.form.template, placed)
        answers = [part.answer for part in parts for _ in range(part.text.count(IMAGE_TEXT))]
        if not self.form.compat:
            return answers
        return [len(turns) > 1 and IMAGE_TEXT in turns[1][1]] * len(answers)

    def _fits(self, sample: Sample) -> bool:
        at = np.flatnonzero(sample.tokens == GENERATED)
        if self.limit is None or not len(at):
            return True
        return min(at[-1] + 2, len(sample.tokens)) + len(at) * (self.slots - 1) <= self.limit

    def _shortened(self, record: Record) -> Sample:
        """The sample with as much of the last image's caption as there is room for."""
        at = max(k for k, (_, text) in enumerate(record.turns) if IMAGE_TEXT in text)
        at = max((k for k in range(at + 1) if record.turns[k][0] == "human"), default=0)
        role, question = record.turns[at]
        caption = question.rpartition(IMAGE_TEXT)[2] if role == "human" else ""
        head = question.removesuffix(caption)

        def sample_of(length: int) -> Sample:
            turn = (role, head + caption[:length].rstrip())
            return self._sample(record, [*record.turns[:at], turn, *record.turns[at + 1 :]])

        low, high = 0, len(caption)  # `low` characters fit, `high` do not
        best = sample_of(low)
        if not self._fits(best):
            raise RecordError(
                f"{record.where} takes more than the {self.limit} slots of data.sample_length even without its caption: "
                "raise it, or generate fewer images in a dialogue",
                reason="too_long",
            )
        while high - low > 1:
            middle = (low + high) // 2
            tried = sample_of(middle)
            low, high, best = (middle, high, tried) if self._fits(tried) else (low, middle, best)
        return best


def announcement(tokenizer: Tokenizer) -> list[int]:
    """Ids of the text `<image>`: what the model says before it generates an image."""
    return tokenizer.encode(IMAGE_TEXT, special=False)


def to_generation(
    records: Iterable[dict[str, Any]],
    count: int,
    seed: int,
    skip: str = "sam",
    start: int = 0,
    substring: bool = False,
) -> Iterator[dict[str, Any]]:
    """Captioned images (ShareGPT4V's captioner records) -> records of task generation, in order, at most `count` of them.

    skip: images below a folder of this name are left out; substring: also those that have it anywhere in their path, as in the
    original. start: how many of the others to pass over, so that (count=150000) and (count=200000, start=150000) share one 350K set:
    phrases are drawn by (seed, number among them). RecordError if a record has no caption.
    """
    kept = ((k, raw) for k, raw in enumerate(records) if not _skipped(raw, skip, substring))
    for number, (k, raw) in enumerate(islice(kept, start, start + count), start):
        turns = raw.get("conversations") or ()
        if not raw.get("image") or len(turns) < 2 or not isinstance(turns[1].get("value"), str):
            raise RecordError(
                f"record {k} has no image with a caption: conversion to generation takes records of one image whose "
                "second turn describes it",
                reason="no_answer",
            )
        draws = Draws(seed, 0, number)
        request, reply = (said[draws.integer(j, 0, 2)] for j, said in enumerate((REQUESTS, REPLIES)))
        conversations = [
            {"from": "human", "value": f"{request} {turns[1]['value']}"},
            {"from": "gpt", "value": reply},
        ]
        named = {"id": raw["id"]} if "id" in raw else {}
        yield {**named, "task": "generation", "image": raw["image"], "conversations": conversations}


def _skipped(raw: dict[str, Any], skip: str, substring: bool) -> bool:
    path = str(raw.get("image", ""))
    return bool(skip) and skip in (path if substring else path.replace("\\", "/").split("/")[:-1])
