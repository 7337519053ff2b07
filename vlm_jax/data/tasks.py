"""A dialogue becomes tokens and labels; the loss falls on what the model has to say and on nothing else.

    text    ... USER: <image>\\nWhat is it? ASSISTANT: A cat.</s>
    answer                                           ^^^^^^^^^^^     what follows the open prompt
    tokens  ... 3148 1001 29901 -200 ... 29901 319 6635 29889 2
    labels  ... -100 -100 -100  -100 ... -100  319 6635 29889 2      not shifted, as in the papers

Two masks. The default is exact: the answer's characters are known while rendering, a token is supervised if
it touches one of them, and nothing is tokenised twice. `compat="llava"` is the original arithmetic
(`data.llava_masks`), which counts tokens of re-tokenised pieces and drops all labels of a sample where the
counts disagree. Tokens are the same in both, and so are labels wherever the original v1 and llama_2 count
right; the default also keeps what the original loses (answers that name a role or hold `</s>`, every mpt
sample).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.config import IGNORE, IMAGE, one_of
from vlm_jax.data import llava_masks
from vlm_jax.data.records import Record, RecordError, Turn
from vlm_jax.data.templates import (
    IMAGE_TEXT,
    Piece,
    Template,
    TemplateError,
    messages_of,
    pieces,
    render,
    with_images,
)
from vlm_jax.data.tokenizer import NOWHERE, Span, Tokenizer

V0_SIGNAL = "### "


@dataclasses.dataclass(frozen=True)
class Sample:
    """tokens int32 [n] with IMAGE per image, labels int32 [n] (id or IGNORE, unshifted), images in order."""

    tokens: np.ndarray
    labels: np.ndarray
    images: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How dialogues become samples: a callable Record -> Sample.

    compat: "" the exact mask, "llava" the original's. start_end: `<im_start>` and `<im_end>` around images.
    keep_images: True leaves every `<image>` where it stands; False is LLaVA's rewriting, one image in front
        of its turn; None rewrites unless the record has several images, which would become one.
    max_length: cuts text-only dialogues to so many tokens, as the original does before batching; None leaves
        it to packing, which cuts any dialogue but never an image.
    """

    tokenizer: Tokenizer
    template: Template
    compat: str = ""
    start_end: bool = False
    keep_images: bool | None = None
    max_length: int | None = None

    def __post_init__(self):
        one_of("data.compat", self.compat, ("", "llava"))

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes tokens or labels."""
        settings = [str(getattr(self, field.name)) for field in dataclasses.fields(self)[1:]]
        return hashlib.sha256("\0".join([self.tokenizer.fingerprint, *settings]).encode()).hexdigest()

    def __call__(self, record: Record) -> Sample:
        """RecordError names the record if the template cannot take it or its images do not fit its text."""
        keep = len(record.images) > 1 if self.keep_images is None else self.keep_images
        turns = place_images(record.turns, self.template, self.start_end, keep) if record.images else record.turns
        try:
            tokens, labels = encode_dialogue(turns, self, bool(record.images))
        except TemplateError as error:
            raise RecordError(f"{record.where} does not fit the template: {error}") from error
        shown = int((tokens == IMAGE).sum())
        if shown != len(record.images):
            raise RecordError(
                f"{record.where} has {len(record.images)} image(s) but {shown} {IMAGE_TEXT} in the turns "
                "that are trained on: give each image one, in a human turn"
            )
        return Sample(tokens, labels, record.images)


def place_images(
    turns: Sequence[Turn], template: Template, start_end: bool = False, keep: bool = False
) -> tuple[Turn, ...]:
    """LLaVA's `preprocess_multimodal`: one `<image>` line in front of every turn that has any, with its tags.

    >>> place_images([("human", "a <image> b")], TEMPLATES["v1"])
    (('human', '<image>\\na  b'),)
    """
    placed = []
    for role, text in turns:
        if IMAGE_TEXT in text and not keep:
            text = f"{IMAGE_TEXT}\n{text.replace(IMAGE_TEXT, '').strip()}".strip()
        if IMAGE_TEXT in text and "mmtag" in template.version:
            text = text.replace(IMAGE_TEXT, f"<Image>{IMAGE_TEXT}</Image>")
        if start_end:
            text = text.replace(IMAGE_TEXT, f"<im_start>{IMAGE_TEXT}<im_end>")
        placed.append((role, text))
    return tuple(placed)


def encode_dialogue(turns: Sequence[Turn], form: TextFormat, has_image: bool) -> tuple[np.ndarray, np.ndarray]:
    """Turns -> tokens int32 [n], labels int32 [n]; `has_image`: `<image>` is an image, else it is text."""
    tokenizer = form.tokenizer
    parts = training_pieces(form.template, turns)
    text = "".join(part.text for part in parts)
    has_image = has_image or form.template.style == "PLAIN"  # which is about images alone
    ids, spans = tokenizer.encode_spans(text, images=has_image)
    if not has_image and form.max_length is not None:
        ids, spans = ids[: form.max_length], spans[: form.max_length]
    tokens = np.asarray(ids, np.int32)
    if form.compat:
        said = llava_masks.supervised(form.template, turns, text, tokens, tokenizer, has_image, form.max_length)
    else:
        said = touched(spans, parts)
    return tokens, np.where(said & (tokens != IMAGE), tokens, IGNORE).astype(np.int32)


def touched(spans: Sequence[Span], parts: Sequence[Piece]) -> np.ndarray:
    """bool [n]: does a token stand for a character of an answer? An empty span is the next character's."""
    answer = np.repeat([part.answer for part in parts], [len(part.text) for part in parts])
    before = np.concatenate([[0], np.cumsum(answer)])
    start, end = np.asarray(spans, np.int64).reshape(-1, 2).T
    end = np.minimum(np.maximum(end, start + 1), len(answer))
    return (start != NOWHERE[0]) & (before[end] > before[np.maximum(start, 0)])


def training_pieces(template: Template, turns: Sequence[Turn]) -> list[Piece]:
    """The text that LLaVA trains on, in pieces; TemplateError if the template cannot take the turns."""
    if template.style == "PLAIN":
        return _plain_pieces(template, turns)
    if template.style == "SINGLE":
        return _v0_pieces(template, turns)
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    if not turns or any(role != ("human", "gpt")[i % 2] for i, (role, _) in enumerate(turns)):
        raise TemplateError("its roles are out of order, human and gpt must alternate")
    return pieces(template, messages_of(template, [text for _, text in turns]))


def _plain_pieces(template: Template, turns: Sequence[Turn]) -> list[Piece]:
    """`<image>caption\\n`: the question is not read, but for its images."""
    if len(turns) != 2 or IMAGE_TEXT not in turns[0][1]:
        raise TemplateError(f"a plain template takes one question with {IMAGE_TEXT} and one answer")
    return [Piece(IMAGE_TEXT * turns[0][1].count(IMAGE_TEXT)), Piece(turns[1][1] + template.sep, True)]


def _v0_pieces(template: Template, turns: Sequence[Turn]) -> list[Piece]:
    """`{system}\\n\\n### Human: ...\\n### Assistant: ...\\n### `; the "###" behind an answer closes it."""
    names = {"human": template.roles[0], "gpt": template.roles[1]}
    out, answered = [Piece(template.system + "\n\n")], False
    for role, text in turns:
        out += [Piece(V0_SIGNAL[:-1], answered), Piece(f" {names.get(role, 'unknown')}:")]
        answered = role == "gpt"
        out.append(Piece(f" {text}\n", answered))
    return [*out, Piece(V0_SIGNAL[:-1], answered), Piece(V0_SIGNAL[-1])]


def prompt(
    texts: str | Sequence[str],
    tokenizer: Tokenizer,
    template: Template,
    images: int = 0,
    start_end: bool = False,
) -> np.ndarray:
    """Tokens int32 [n] of a question, or of a dialogue question, answer, ..., question, open for the answer.

    `images` are shown in front of the first question unless the texts place them (`<image>` or
    `<image-placeholder>`). A plain template has no questions: its prompt is the images alone, as in caption
    pre-training.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(texts) % 2 == 0:
        raise TemplateError(
            f"a prompt is a question, or question, answer, ..., question: {len(texts)} texts end on an answer"
        )
    if template.style == "PLAIN":
        return np.asarray(tokenizer.encode_images(IMAGE_TEXT * images), np.int32)
    placed = [with_images(text, 0, start_end) for text in texts]
    if not any(IMAGE_TEXT in text for text in placed):
        placed[0] = with_images(placed[0], images, start_end)
    tokens = np.asarray(tokenizer.encode_images(render(template, messages_of(template, [*placed, None]))), np.int32)
    shown = int((tokens == IMAGE).sum())
    if shown != images:
        raise TemplateError(
            f"{images} image(s) were given but the prompt has {shown} {IMAGE_TEXT}: each image needs one"
        )
    return tokens
