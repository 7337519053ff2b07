"""A dialogue becomes what T5's encoder reads and what its decoder has to say, as CLIP-FlanT5 was trained.

    t5_v1                {system} USER: <image>\\nWhat is it? ASSISTANT:      ->  A cat.      every earlier turn is read
    t5_plain             <image>                                             ->  caption
    t5_plain_split_text  <image>caption[:k]                                  ->  caption[k:]   k drawn from 1 .. length/2
    encoder  71 3582 ... 1 -200 363 ... 1      EOS closes every string, that before an image too
    decoder  71 1712 5 1                       the answer alone, with its EOS

Wordings and arithmetic are those of linzhiqiu/CLIP-FlanT5 (arXiv 2404.01291). k counts characters, so that a word
may be cut in two.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.config import IGNORE, IMAGE, ConfigError, one_of
from vlm_jax.data.records import Record, Turn
from vlm_jax.data.tasks import Sample, check_images, place_images, template_errors
from vlm_jax.data.templates import IMAGE_TEXT, TEMPLATES, TemplateError, messages_of, render
from vlm_jax.data.tokenizer import Tokenizer

T5_TEMPLATES = tuple(sorted(name for name, t in TEMPLATES.items() if t.origin == "clip_flant5"))
MEASURED = 4  # splits near either end that are measured: fewer than one draw in a thousand is longer, by a token
_V1 = TEMPLATES["t5_v1"]


@dataclasses.dataclass(frozen=True)
class T5Format:
    """How dialogues become samples of an encoder-decoder model: a callable (Record, draws) -> Sample.

    template: one of T5_TEMPLATES. max_length: cuts question and answer of text-only dialogues to so many tokens, EOS
        kept, as the original does before batching; None leaves it to packing.
    keep_images: as in TextFormat; None moves `<image>` in front of its turn unless the record has several images.
    """

    tokenizer: Tokenizer
    template: str = "t5_v1"
    max_length: int | None = None
    keep_images: bool | None = None

    def __post_init__(self):
        one_of("data.template", self.template, T5_TEMPLATES)
        if self.tokenizer.eos_id is None:
            raise ConfigError(f"the tokenizer of {self.tokenizer.source} has no EOS, which every answer must end with")

    @property
    def random(self) -> bool:
        """Is anything drawn? Then a sample differs from epoch to epoch."""
        return self.template == "t5_plain_split_text"

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes tokens or answers."""
        settings = [str(getattr(self, field.name)) for field in dataclasses.fields(self)[1:]]
        return hashlib.sha256("\0".join(["t5", self.tokenizer.fingerprint, *settings]).encode()).hexdigest()

    def __call__(self, record: Record, draws: Any = None) -> Sample:
        """A question behind the last answer is left out. Without draws: the longest question and the longest answer.

        RecordError names a record that the template cannot take, whose images do not fit its questions, or with an
        `<image>` in the answer, which would be a token that no decoder has. Without images, `<image>` is plain text.
        """
        turns = record.turns[:-1] if record.turns and record.turns[-1][0] == "human" else record.turns
        keep = len(record.images) > 1 if self.keep_images is None else self.keep_images
        with template_errors(record):
            if record.images and any(IMAGE_TEXT in text for _, text in turns[-1:]):
                raise TemplateError(f"its answer holds {IMAGE_TEXT}, which no decoder of text can say: take it out")
            turns = place_images(turns, _V1, keep=keep) if record.images else turns
            question, answer = encode_exchange(turns, self, bool(record.images), draws)
        check_images(record, shown=int((question == IMAGE).sum()), given=len(record.images))
        return Sample(question, np.full_like(question, IGNORE), record.images, answer=answer)


def encode_exchange(
    turns: Sequence[Turn], form: T5Format, has_image: bool, draws: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Turns -> what the encoder reads, int32 [n], and what the decoder says, int32 [m], exactly as the original has them.

    `has_image`: `<image>` is an image, else it is text. draws.integer(0, 1, length/2) is the split of a caption; None
    stands for the splits that make either side longest. TemplateError if the template cannot take the turns.
    """
    if form.template == "t5_v1":
        question, answer = _chat(turns)
        return _question(question, form, has_image), _answer(answer, form, has_image)
    if len(turns) != 2 or IMAGE_TEXT not in turns[0][1]:
        raise TemplateError(f"a plain template takes one question with {IMAGE_TEXT} and one answer")
    shown, caption = IMAGE_TEXT * turns[0][1].count(IMAGE_TEXT), turns[1][1]
    half = len(caption) // 2
    if not form.random or half == 0:
        late = early = [0]
    elif draws is not None:
        late = early = [draws.integer(0, 1, half)]
    else:
        late, early = range(max(half - MEASURED, 0) + 1, half + 1), range(1, min(half, MEASURED) + 1)
    questions = [_question(shown + caption[:k], form, True) for k in late]
    answers = [_answer(caption[k:], form, True) for k in early]
    return max(questions, key=len), max(answers, key=len)


def answer_slots(answer: np.ndarray, start: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs int32 [m], targets int32 [m], weights float32 [m]) of a decoder that has to say `answer`.

    Inputs are the answer one place later behind `start`, T5's padding token; every target counts.
    """
    targets = np.asarray(answer, np.int32)
    inputs = np.concatenate([np.full(1, start, np.int32), targets])[:-1]
    return inputs, targets, np.ones(len(targets), np.float32)


def _chat(turns: Sequence[Turn]) -> tuple[str, str]:
    """The dialogue up to its last answer, open for it, and that answer; an answer in front is dropped."""
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    if any(role != ("human", "gpt")[i % 2] for i, (role, _) in enumerate(turns)):
        raise TemplateError("its roles are out of order, human and gpt must alternate")
    if not turns or turns[-1][0] != "gpt":
        raise TemplateError("its last turn is not an answer, there is nothing to say")
    earlier = [text for _, text in turns[:-1]]
    return render(_V1, messages_of(_V1, [*earlier, None])) + " ", turns[-1][1]


def _question(text: str, form: T5Format, has_image: bool) -> np.ndarray:
    ids = form.tokenizer.encode_spans(text, images=has_image)[0]
    return _cut(ids, form, has_image, len(form.tokenizer.suffix))


def _answer(text: str, form: T5Format, has_image: bool) -> np.ndarray:
    """Without what opens a text, and closed by EOS whatever the tokenizer's habit is."""
    tokenizer = form.tokenizer
    ids = tokenizer.encode_spans(text, images=has_image)[0][len(tokenizer.prefix) :]
    return _cut(ids if tokenizer.suffix else [*ids, tokenizer.eos_id], form, has_image, 1)


def _cut(ids: list[int], form: T5Format, has_image: bool, closing: int) -> np.ndarray:
    """Text-only ids cut to max_length, the last `closing` kept."""
    if not has_image and form.max_length is not None and len(ids) > form.max_length:
        ids = ids[: form.max_length - closing] + ids[len(ids) - closing :]
    return np.asarray(ids, np.int32)
