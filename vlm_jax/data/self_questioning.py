"""Dialogues in which the model also learns to ask: some questions become VUSER's, and carry loss (SQ-LLaVA, arXiv 2403.11299).

    USER: <image>\\nq1 ASSISTANT: a1</s>VUSER: q2</s> ASSISTANT: a2</s>USER: q3 ASSISTANT: a3</s>
                                 ^^^^^^       ^^^^^^^           ^^^^^^                    ^^^^^^    loss

Of a record with images, every question but the first is asked by the model with probability `share`, anew in each
epoch. `vuser` turns in the data are always asked by it. The exact mask follows the turns; a leading answer and a
question that nobody answers are left out. `compat="llava"` is the original's procedure (heliossun/SQ-LLaVA): it
trains on all turns as they come, counts re-tokenised pieces, gives `vuser` turns of the data no loss and drops all
labels of a sample whose counts do not add up.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.data.draws import Draws
from vlm_jax.data.llava_masks import checked, counter
from vlm_jax.data.records import Record, Turn
from vlm_jax.data.tasks import Encoded, Sample, TextFormat, encode_pieces
from vlm_jax.data.templates import IMAGE_TEXT, Piece, Template, TemplateError, render

ASKED = "vuser"  # the role of a turn that the model asks
_LINE_OF_IMAGE = f"{IMAGE_TEXT}\n"


@dataclasses.dataclass(frozen=True)
class SelfQuestioning:
    """How dialogues become samples with questions of the model: a callable (Record, draws) -> Sample.

    form: its template has a third role (v1_sq). share: of the questions behind the first, 0 .. 1 (SQ-LLaVA's sq_r). Turn k of a
    record is the model's where draws.uniform(k) < share; without draws all are, which is the longest sample.
    """

    form: TextFormat
    share: float = 0.5

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ConfigError(f"data.self_question={self.share} is not a share: give a number from 0 to 1")
        if len(self.form.template.roles) < 3:
            raise ConfigError("self-questioning needs a template with a role that asks: use data.template=v1_sq")

    @property
    def random(self) -> bool:
        """Is anything drawn? Then a sample differs from epoch to epoch."""
        return self.share > 0

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes tokens or labels."""
        return hashlib.sha256(f"self-questioning {self.share} {self.form.fingerprint}".encode()).hexdigest()

    def __call__(self, record: Record, draws: Draws | None = None) -> Sample:
        """RecordError names the record if the template cannot take it or its images do not fit its text."""
        return self.form.sample(record, functools.partial(self.encode, draws=draws))

    def encode(self, turns: Sequence[Turn], has_image: bool, draws: Draws | None = None) -> Encoded:
        """Turns (human, gpt, vuser) with images in place -> tokens int32 [n], labels int32 [n]."""
        form = self.form
        if not form.compat:
            first, end = _answered(turns)
            kept = [(self._role(k, turns, first, has_image, draws), turns[k][1]) for k in range(first, end)]
            return encode_pieces(dialogue_pieces(form.template, kept), form, has_image)
        names = dict(zip(("human", "gpt", ASKED), form.template.roles))
        messages = []
        for k, (said_by, text) in enumerate(turns):
            role = self._role(k, turns, 0, has_image, draws)
            messages.append((names[role], text + form.template.sep2 if role != said_by else text))
        parts = [Piece(render(form.template, messages))]
        return encode_pieces(parts, form, has_image, functools.partial(supervised, form, has_image=has_image))

    def _role(self, k: int, turns: Sequence[Turn], first: int, has_image: bool, draws: Draws | None) -> str:
        """Who says turn k: the role that it has, or the model in place of a human."""
        drawable = has_image and k > first and turns[k][0] == "human"
        asked = drawable and self.share > 0 and (draws is None or draws.uniform(k) < self.share)
        return ASKED if asked else turns[k][0]


def _answered(turns: Sequence[Turn]) -> tuple[int, int]:
    """The first question and the end of the last answer; TemplateError unless questions and answers alternate there."""
    answers = [k for k, (role, _) in enumerate(turns) if role == "gpt"]
    first = next((k for k, (role, _) in enumerate(turns) if role != "gpt"), len(turns))
    end = answers[-1] + 1 if answers else 0
    if end <= first:
        raise TemplateError("it has no answer to a question")
    if any((turns[k][0] == "gpt") != bool((k - first) % 2) for k in range(first, end)):
        raise TemplateError("its roles are out of order, questions (human or vuser) and gpt must alternate")
    return first, end


def dialogue_pieces(template: Template, turns: Sequence[Turn]) -> list[Piece]:
    """Questions and answers in turns, as pieces; what the model asks is closed by `</s>` and has loss.

    The line of an image that opens the dialogue has none: no text before it lets the model know that there is one.
    """
    user, assistant, asker = template.roles
    out = [Piece(template.system + template.sep)]
    for k, (role, text) in enumerate(turns):
        if role == ASKED:
            shown = _image_line(text) if k == 0 else ""
            out += [Piece(f"{asker}:"), Piece(f" {shown}" if shown else "")]
            out += [Piece(f"{'' if shown else ' '}{text[len(shown) :]}{template.sep2}", True), Piece(template.sep)]
        else:
            name, end = (assistant, template.sep2) if role == "gpt" else (user, template.sep)
            out += [Piece(f"{name}:"), Piece(f" {text}{end}" if text else "", role == "gpt")]
    return out


def _image_line(text: str) -> str:
    """Text up to the last image, with the line end and the `<im_end>` behind it."""
    before, found, behind = text.rpartition(IMAGE_TEXT)
    rest = behind.removeprefix("<im_end>").removeprefix("\n")
    return f"{before}{found}{behind[: len(behind) - len(rest)]}" if found else ""


def supervised(form: TextFormat, text: str, tokens: np.ndarray, has_image: bool) -> np.ndarray:
    """bool [n]: the tokens that the original gives a label. `tokens` int32 [n] are those of `text`.

    A round that does not hold one " ASSISTANT: " is taken for a question of VUSER, whatever it is.
    """
    template, count = form.template, counter(form, has_image)
    separator = f"{template.sep}{template.roles[1]}: "
    asker = count(f"{template.roles[2]}: ") - 2
    said = np.ones(len(tokens), bool)
    said[:1], cursor = False, 1
    for k, turn in enumerate(text.split(template.sep2)):
        if not turn:
            break
        parts = turn.split(separator)
        if len(parts) == 2:
            masked = count(parts[0] + separator) - 2
        elif has_image and k == 0:
            masked = count(turn.split(_LINE_OF_IMAGE)[0] + _LINE_OF_IMAGE)
        else:
            masked = asker
        said[cursor : cursor + masked] = False
        cursor += count(turn)
    return checked(said, cursor, tokens, form)
