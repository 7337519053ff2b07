"""The supervision masks of haotian-liu/LLaVA v1.2.2 (`llava/train/train.py`) and of LLaVAR, quirks included.

    n(string)     tokens of a piece of the text tokenised alone, its BOS counted for the terminator before it
    v1, llama_2   round = text between terminators, instruction = round up to the answer
                  supervise [cursor + n(instruction) - 2, cursor + n(round)), then cursor += n(round)
    mpt           the same with n(instruction) - 1; no terminator is counted, so nearly all samples are lost
                  (LLaVAR: with n(instruction) and n(round) + n(terminator), which counts right)
    v0            n(header), then each turn; human turns masked but for two tokens; each BOS shifts the rest

A sample whose counts do not add up to its length loses all its labels (the original warns). `data.tasks` has
the exact masks; plain templates have no others, nothing is counted there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm_jax.data.records import Turn
from vlm_jax.data.templates import Template

if TYPE_CHECKING:
    from vlm_jax.data.tasks import TextFormat

Count = Callable[[str], int]


def supervised(form: TextFormat, turns: Sequence[Turn], text: str, tokens: np.ndarray, has_image: bool) -> np.ndarray:
    """bool [n]: the tokens that the original gives a label. `tokens` int32 [n] are those of `text`."""
    said = np.ones(len(tokens), bool)
    if form.template.style == "SINGLE":
        return _v0(said, form, turns, has_image)
    marked = said.copy()
    counted = (_mpt if form.template.style == "MPT" else _two)(marked, form, text, counter(form, has_image))
    return checked(marked, counted, tokens, form)


def counter(form: TextFormat, has_image: bool) -> Count:
    """n of the module: how many tokens a string has, BOS included."""
    return lambda string: len(form.encode(string, has_image)[0])


def checked(marked: np.ndarray, counted: int, tokens: np.ndarray, form: TextFormat) -> np.ndarray:
    """`marked` up to what was counted, or nothing if the count is not the length; pad ids are not part of it."""
    marked[counted:] = False
    cut = form.max_length is not None and counted >= form.max_length  # what the original takes for a truncated sample
    mismatch = not cut and counted != int((tokens != form.tokenizer.pad_id).sum())
    return np.zeros_like(marked) if mismatch else marked


def _two(marked: np.ndarray, form: TextFormat, text: str, count: Count) -> int:
    """v1 and llama_2: mask instructions in place, return how many tokens were counted."""
    template: Template = form.template
    v1 = template.style == "TWO"
    separator = f"{template.sep}{template.roles[1]}: " if v1 else "[/INST] "
    # Behind </s> a tokenizer that is not legacy writes USER without the invisible space, one piece less.
    corrected = int(v1 and form.tokenizer.legacy is False and template.origin == "llava")
    cursor = 1
    marked[:1] = False
    for k, turn in enumerate(text.split(template.sep2)):
        parts = turn.split(separator)
        if len(parts) != 2:
            break
        shorter = corrected if k else 0
        marked[cursor : cursor + count(parts[0] + separator) - 2 - shorter] = False
        cursor += count(turn) - shorter
    return cursor


def _mpt(marked: np.ndarray, form: TextFormat, text: str, count: Count) -> int:
    """ChatML: system, question and answer make the first round, then question and answer each."""
    template: Template = form.template
    pieces = text.split(template.sep)
    starts = [0, *range(3, len(pieces), 2)]
    separator = template.sep + template.roles[1]
    mended = template.origin == "llavar"
    closing = count(template.sep) if mended else 0
    cursor = 0
    for start in starts:
        turn = template.sep.join(pieces[start : start + (2 if start else 3)])
        parts = turn.split(separator)
        if len(parts) != 2:
            break
        longer = int(start > 0 and form.tokenizer.legacy is True and not mended)
        marked[cursor : cursor + count(parts[0] + separator) - int(not mended) + longer] = False
        cursor += count(turn) + longer + closing
    return cursor


def _v0(said: np.ndarray, form: TextFormat, turns: Sequence[Turn], has_image: bool) -> np.ndarray:
    """Masks human turns but for two tokens; pieces that may be cut are, and their pad ids are not counted."""
    cuts = form.cuts(has_image)

    def length(string: str) -> int:
        ids = form.encode(string, has_image)[0]
        return sum(i != form.tokenizer.pad_id for i in ids[: form.max_length]) if cuts else len(ids)

    template: Template = form.template
    names = {"human": template.roles[0], "gpt": template.roles[1]}
    cursor = length(template.system + "\n\n")
    said[:cursor] = False
    for role, text in turns:
        end = cursor + length(f"### {names.get(role, 'unknown')}: {text}\n")
        if role == "human":
            said[cursor + 2 : end] = False
        cursor = end
    return said
