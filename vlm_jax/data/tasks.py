"""A record becomes tokens and labels; the loss falls on what the model has to say and on nothing else.

    text    ... USER: <image>\\nWhat is it? ASSISTANT: A cat.</s>
    answer                                           ^^^^^^^^^^^     what follows the open prompt
    tokens  ... 3148 1001 29901 -200 ... 29901 319 6635 29889 2
    labels  ... -100 -100 -100  -100 ... -100  319 6635 29889 2      not shifted, as in the papers

    task    understanding (vqa, caption)  TextFormat, here; T5 templates: data.t5_text
            self_questioning              data.self_questioning: what template v1_sq makes of understanding
            generation                    data.generation: images that the assistant says are to be generated

Two masks. The default is exact: the answer's characters are known while rendering, a token is supervised if
it touches one of them, and nothing is tokenised twice. `compat="llava"` is the original arithmetic of the
project that the template or the task comes from (`data.llava_masks`, `data.self_questioning`), which counts
tokens of re-tokenised pieces and drops all labels of a sample where the counts disagree. Tokens are the same in
both, and so are labels wherever the original counts right; the default also keeps what the original loses
(answers that name a role or hold `</s>`, every mpt sample).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.config import IGNORE, IMAGE, ConfigError, one_of
from vlm_jax.data import llava_masks
from vlm_jax.data.draws import Draws
from vlm_jax.data.options import DataConfig
from vlm_jax.data.records import Record, RecordError, Turn
from vlm_jax.data.templates import (
    IMAGE_TEXT,
    Piece,
    Template,
    TemplateError,
    messages_of,
    pieces,
    render,
    template,
    with_images,
)
from vlm_jax.data.tokenizer import NOWHERE, Span, Tokenizer

V0_SIGNAL = "### "
IMAGINE = "Imagine the image you may looking at."  # plain_qav
UNDERSTANDING = ("understanding", "vqa", "caption")  # tasks that only read images

Encoder = Callable[..., "Sample"]  # (record, draws=None), with a `fingerprint` and, if it draws, `random`
Encoded = tuple[np.ndarray, np.ndarray]  # tokens, labels


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record as the model reads it.

    tokens int32 [n] with IMAGE per image that is shown and GENERATED per image to be generated; labels int32 [n] (id or IGNORE,
    unshifted); images that are shown and `generated` ones, each in order. answer int32 [m]: what an encoder-decoder's decoder has to
    say (tokens are then the encoder's and no label is set); None for decoder-only models.
    """

    tokens: np.ndarray
    labels: np.ndarray
    images: tuple[Any, ...] = ()
    generated: tuple[Any, ...] = ()
    answer: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How dialogues become samples: a callable Record -> Sample.

    compat: "" the exact mask, "llava" the original's. start_end: `<im_start>` and `<im_end>` around images.
    keep_images: True leaves every `<image>` where it stands; False moves it in front, LLaVA of its turn, LLaVAR
        of the first question, in a turn of its own; None is False for LLaVA's templates unless the record has
        several images, which would become one, and True for LLaVAR's.
    max_length: cuts dialogues without images (LLaVAR: all) to so many tokens, as the original does before
        batching; None leaves it to packing, which cuts any dialogue but never an image.
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

    def __call__(self, record: Record, draws: Draws | None = None) -> Sample:
        """RecordError names the record if the template cannot take it or its images do not fit its text. Nothing is drawn."""
        return self.sample(record, functools.partial(encode_dialogue, form=self))

    def sample(self, record: Record, encode: Callable[..., Encoded]) -> Sample:
        """A sample of `encode(turns, has_image=...)`, which is given the turns with their images in place."""
        keep = len(record.images) > 1 if self.keep_images is None else self.keep_images
        if self.keep_images is None and self.template.origin == "llavar":
            keep = True
        turns = place_images(record.turns, self.template, self.start_end, keep) if record.images else record.turns
        with template_errors(record):
            tokens, labels = encode(turns, has_image=bool(record.images))
        images = record.images * (2 if self.template.version == "plain_qav" else 1)
        check_images(record, shown=int((tokens == IMAGE).sum()), given=len(images))
        return Sample(tokens, labels, images)

    def encode(self, text: str, images: bool) -> tuple[list[int], list[Span]]:
        """Ids and spans of a text; `images`: every `<image>` in it becomes IMAGE, else it is text."""
        if not images or self.template.origin != "llavar":
            return self.tokenizer.encode_spans(text, images)
        tokenizer = _with_image_token(self.tokenizer)
        ids, spans = tokenizer.encode_spans(text, images=False)
        image = tokenizer.id_of(IMAGE_TEXT)
        return [IMAGE if i == image else i for i in ids], spans

    def cuts(self, has_image: bool) -> bool:
        """Does max_length hold for a dialogue with or without images?"""
        return not has_image or self.template.origin == "llavar"


@functools.lru_cache(maxsize=8)
def _with_image_token(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that keeps `<image>` whole inside a text, as LLaVAR's does with the patches of an image."""
    return tokenizer.with_tokens(IMAGE_TEXT)


@contextlib.contextmanager
def template_errors(record: Record) -> Iterator[None]:
    """A TemplateError inside becomes the RecordError of this record."""
    try:
        yield
    except TemplateError as error:
        raise RecordError(f"{record.where} does not fit the template: {error}", reason="template") from error


def check_images(record: Record, shown: int, given: int) -> None:
    """RecordError unless each image of a record has one `<image>` in the turns that are trained on."""
    if shown != given:
        raise RecordError(
            f"{record.where} has {given} image(s) but {shown} {IMAGE_TEXT} in the turns "
            "that are trained on: give each image one, in a human turn",
            reason="image_count",
        )


def place_images(
    turns: Sequence[Turn], template: Template, start_end: bool = False, keep: bool = False
) -> tuple[Turn, ...]:
    """`preprocess_multimodal`: one `<image>` line in front of every turn that has any, with its tags.

    LLaVAR knows no lines: what is moved in front of the first question (sep_image_conv_front) is a turn by itself.

    >>> place_images([("human", "a <image> b")], TEMPLATES["v1"])
    (('human', '<image>\\na  b'),)
    """
    if template.origin == "llavar":
        turns, keep = turns if keep else _separate_image(turns, template), True
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


def _separate_image(turns: Sequence[Turn], template: Template) -> tuple[Turn, ...]:
    (role, text), *others = turns
    if IMAGE_TEXT in text:
        text = f"{IMAGE_TEXT}{template.sep}{template.roles[0]}: {text.replace(IMAGE_TEXT, '').strip()}"
    return ((role, text), *others)


def encode_dialogue(turns: Sequence[Turn], form: TextFormat, has_image: bool) -> Encoded:
    """Turns -> tokens int32 [n], labels int32 [n]; `has_image`: `<image>` is an image, else it is text."""
    parts = training_pieces(form.template, turns)
    if not form.compat or form.template.style == "PLAIN":
        return encode_pieces(parts, form, has_image or form.template.style == "PLAIN")

    def original(text: str, tokens: np.ndarray) -> np.ndarray:
        return llava_masks.supervised(form, turns, text, tokens, has_image)

    return encode_pieces(parts, form, has_image, original)


def encode_pieces(
    parts: Sequence[Piece],
    form: TextFormat,
    has_image: bool,
    original: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> Encoded:
    """Rendered pieces -> tokens, labels: the exact mask, or `original(text, tokens)` -> bool [n]. No image has a label."""
    text = "".join(part.text for part in parts)
    ids, spans = form.encode(text, has_image)
    if form.max_length is not None and form.cuts(has_image):
        ids, spans = ids[: form.max_length], spans[: form.max_length]
    tokens = np.asarray(ids, np.int32)
    said = touched(spans, parts) if original is None else original(text, tokens)
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
    shown, caption = IMAGE_TEXT * turns[0][1].count(IMAGE_TEXT), Piece(turns[1][1] + template.sep, True)
    again = [Piece(f"{IMAGINE}{shown}{template.sep}")] if template.version == "plain_qav" else []
    return [Piece(shown), caption, *again]


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
        placed[0] = with_images(placed[0], images, start_end, behind=template.origin == "llavar")
    text = render(template, messages_of(template, [*placed, None]))
    text += " " if template.origin == "clip_flant5" else ""  # as data.t5_text has it
    tokens = np.asarray(TextFormat(tokenizer, template).encode(text, images=True)[0], np.int32)
    shown = int((tokens == IMAGE).sum())
    if shown != images:
        raise TemplateError(
            f"{images} image(s) were given but the prompt has {shown} {IMAGE_TEXT}: each image needs one"
        )
    return tokens


@dataclasses.dataclass(frozen=True)
class Tasks:
    """A callable (record, draws) -> Sample that does with a record what its task asks for.

    encoders: task -> encoder.
    """

    encoders: Mapping[str, Encoder]

    @property
    def random(self) -> bool:
        """Is anything drawn? Then a sample differs from epoch to epoch."""
        return any(getattr(encode, "random", False) for encode in self.encoders.values())

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes a sample of any task."""
        marks = [f"{task} {encode.fingerprint}" for task, encode in sorted(self.encoders.items())]
        return hashlib.sha256("\0".join(marks).encode()).hexdigest()

    def __call__(self, record: Record, draws: Draws | None = None) -> Sample:
        """Without draws the longest sample that can be drawn. RecordError if no such task is known."""
        task = record.task or UNDERSTANDING[0]
        if task not in self.encoders:
            raise RecordError(
                f"{record.where} has task {task!r}: with this data.template it can be {', '.join(self.encoders)}",
                reason="task",
            )
        return self.encoders[task](record, draws)


def encoder(data: DataConfig, tokenizer: Tokenizer, generated_slots: int = 1) -> Tasks:
    """What `data` makes of records. generated_slots: slots of an image that is generated, which captions make room for."""
    # these build on this module
    from vlm_jax.data.generation import Generation
    from vlm_jax.data.self_questioning import SelfQuestioning
    from vlm_jax.data.t5_text import T5_TEMPLATES, T5Format

    if data.template in T5_TEMPLATES:
        reading = T5Format(tokenizer, data.template, keep_images=data.keep_images)
        encoders = dict.fromkeys(UNDERSTANDING, reading)
    else:
        form = TextFormat(tokenizer, template(data.template), data.compat, data.im_start_end, data.keep_images)
        questions = SelfQuestioning(form, data.self_question) if len(form.template.roles) > 2 else None
        encoders = dict.fromkeys(UNDERSTANDING, questions or form)
        encoders["generation"] = Generation(form, generated_slots, data.sample_length)
        if questions is not None:
            encoders["self_questioning"] = questions
    for name, source in data.sources.items():
        if source.task and source.task not in encoders:
            raise ConfigError(
                f"data.sources.{name}.task={source.task!r} is unknown with data.template={data.template!r}: "
                f"use one of {', '.join(encoders)}"
            )
    return Tasks(encoders)
