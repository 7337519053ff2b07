"""The supervision masks of haotian-liu/LLaVA v1.2.2 (`llava/train/train.py`), quirks included.

    n(string)     tokens of a piece of the text tokenised alone, its BOS counted for the terminator before it
    v1, llama_2   round = text between terminators, instruction = round up to the answer
                  supervise [cursor + n(instruction) - 2, cursor + n(round)), then cursor += n(round)
    mpt           the same with n(instruction) - 1; no terminator is counted, so nearly all samples are lost
    v0            n(header), then each turn; human turns masked but for two tokens; each BOS shifts the rest
    plain         all but the image

A sample whose counts do not add up to its length loses all its labels (the original warns). `data.tasks` has
the exact masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlm_jax.data.records import Turn
from vlm_jax.data.templates import IMAGE_TEXT, Template
from vlm_jax.data.tokenizer import Tokenizer

Count = Callable[[str], int]


def supervised(
    template: Template,
    turns: Sequence[Turn],
    text: str,
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    has_image: bool,
    max_length: int | None,
) -> np.ndarray:
    """bool [n]: the tokens that the original gives a label. `tokens` int32 [n] are those of `text`."""

    def count(string: str) -> int:
        return len(tokenizer.encode_images(string) if has_image else tokenizer.encode(string))

    said = np.ones(len(tokens), bool)
    if template.style == "PLAIN":
        said[: len(tokenizer.encode_images(IMAGE_TEXT * turns[0][1].count(IMAGE_TEXT)))] = False
        return said
    if template.style == "SINGLE":
        return _v0(said, template, turns, tokenizer, count if has_image else None, max_length)
    marked = said.copy()
    counted = (_mpt if template.style == "MPT" else _two)(marked, template, text, tokenizer, count)
    marked[counted:] = False
    cut = max_length is not None and counted >= max_length  # what the original takes for a truncated sample
    mismatch = not cut and counted != int((tokens != tokenizer.pad_id).sum())
    return ~said if mismatch else marked


def _two(marked: np.ndarray, template: Template, text: str, tokenizer: Tokenizer, count: Count) -> int:
    """v1 and llama_2: mask instructions in place, return how many tokens were counted."""
    v1 = template.style == "TWO"
    separator = f"{template.sep}{template.roles[1]}: " if v1 else "[/INST] "
    cursor = 1
    marked[:1] = False
    for k, turn in enumerate(text.split(template.sep2)):
        parts = turn.split(separator)
        if len(parts) != 2:
            break
        # Behind </s> a tokenizer that is not legacy writes USER without the invisible space, one piece less.
        shorter = int(v1 and k > 0 and tokenizer.legacy is False)
        marked[cursor : cursor + count(parts[0] + separator) - 2 - shorter] = False
        cursor += count(turn) - shorter
    return cursor


def _mpt(marked: np.ndarray, template: Template, text: str, tokenizer: Tokenizer, count: Count) -> int:
    """ChatML: system, question and answer make the first round, then question and answer each."""
    pieces = text.split(template.sep)
    starts = [0, *range(3, len(pieces), 2)]
    separator = template.sep + template.roles[1]
    cursor = 0
    for start in starts:
        turn = template.sep.join(pieces[start : start + (2 if start else 3)])
        parts = turn.split(separator)
        if len(parts) != 2:
            break
        longer = int(start > 0 and tokenizer.legacy is True)
        marked[cursor : cursor + count(parts[0] + separator) - 1 + longer] = False
        cursor += count(turn) + longer
    return cursor


def _v0(
    said: np.ndarray,
    template: Template,
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    count: Count | None,
    max_length: int | None,
) -> np.ndarray:
    """Masks human turns but for two tokens; text-only pieces (count None) are cut, pad ids not counted."""

    def length(string: str) -> int:
        if count is not None:
            return count(string)
        return sum(i != tokenizer.pad_id for i in tokenizer.encode(string)[:max_length])

    names = {"human": template.roles[0], "gpt": template.roles[1]}
    cursor = length(template.system + "\n\n")
    said[:cursor] = False
    for role, text in turns:
        end = cursor + length(f"### {names.get(role, 'unknown')}: {text}\n")
        if role == "human":
            said[cursor + 2 : end] = False
        cursor = end
    return said
