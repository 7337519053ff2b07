"""Where generated text ends: stop strings are looked for in the decoded text, so they may begin or end inside a token.

ids 12 7 91 ...  --decode-->  "It is sunny\\nUSER: and"  --stop "\\nUSER:"-->  "It is sunny"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def find(text: str, stops: Sequence[str]) -> int:
    """Start of the earliest stop string in `text`, -1 without one."""
    starts = [text.find(stop) for stop in stops if stop in text]
    return min(starts, default=-1)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before its earliest stop string, white space around it removed."""
    at = find(text, stops)
    return (text if at < 0 else text[:at]).strip()


def shortest(ids: Sequence[int], tokenizer: Any, stops: Sequence[str], known: int = 0) -> list[int] | None:
    """The shortest prefix of `ids` whose text holds a stop string, or None; the first `known` ids are known to hold none."""
    if not stops or find(tokenizer.decode(ids, skip_special=False), stops) < 0:
        return None
    ends = range(known + 1, len(ids) + 1)
    return list(
        next(ids[:n] for n in ends if n == len(ids) or find(tokenizer.decode(ids[:n], skip_special=False), stops) >= 0)
    )


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of an unfinished text that later tokens cannot take back.

    Held back: white space at the end, the beginning of a stop string, and the replacement character of a half-read one.

    >>> settled("sunny ##", ["###"])
    'sunny'
    """
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held].rstrip()
