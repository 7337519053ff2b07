"""Scores of smart-watch answers, after arXiv 2505.23043's evaluator with its defects mended, and what guessing would score.

    time      1 - (e_h / 6 + e_m / 30 + e_s / 30) / 3,  e = circular distance, after reducing 27:99:00 to 03:39:00
    battery   1 - |answer - truth| / 100
    weather, positions   1 if the truth occurs in the answer

An answer in which nothing can be read scores 0. A random time scores about 0.5 and a random battery level about 0.67: these are no
accuracies, so every score is shown beside `chance`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from vlm_jax.data import smartwatch_text

WEATHERS = ("sunny", "raining", "cloudy")
PUBLISHED_LIMIT = 499  # records of the test file that the published evaluation reads
TIME = re.compile(r"(\d{2}):(\d{2}):(\d{2})")
BATTERY = re.compile(r"\b(100|[1-9]\d?|0)%")
PERIODS = (12, 60, 60)
GRADED = ("time", "battery")  # attributes whose score is finer than right or wrong


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one picture. `turns` are the earlier questions and true answers of the dialogue, in order."""

    image: str
    text: str
    truth: str
    attribute: str
    turns: tuple[str, ...] = ()


def kind_of(truth: str) -> str:
    """ "time", "weather", "position" or "battery", read from the true answer; "" if it is none of them."""
    if ":" in truth:
        return "time"
    if any(word in truth for word in WEATHERS):
        return "weather"
    if "-" in truth:
        return "position"
    return "battery" if "%" in truth else ""


@functools.cache
def _position_wordings() -> dict[str, str]:
    where = smartwatch_text.templates()["where"]
    return {wording: attribute for attribute, wordings in where.items() for wording in wordings}


def attribute_of(question: str, truth: str) -> str:
    """The attribute asked: as `kind_of`, but a position is "weather_pos" or "battery_pos" where the wording is a known one."""
    kind = kind_of(truth)
    if kind != "position":
        return kind
    return _position_wordings().get(question.removeprefix(smartwatch_text.IMAGE), kind)


def read_time(text: str) -> tuple[int, int, int] | None:
    """The first HH:MM:SS of a text, reduced to a dial's (0..11, 0..59, 0..59)."""
    match = TIME.search(text)
    return tuple(int(part) % period for part, period in zip(match.groups(), PERIODS)) if match else None


def read_battery(text: str) -> int | None:
    """The first percentage of a text, 0..100."""
    match = BATTERY.search(text)
    return int(match[1]) if match else None


def score(truth: str, answer: str) -> float:
    """Score in [0, 1] of an answer; the kind of question is read from the truth."""
    kind = kind_of(truth)
    if kind == "time":
        true, said = read_time(truth), read_time(answer)
        if true is None or said is None:
            return 0.0
        errors = [min(abs(a - b), period - abs(a - b)) / (period / 2) for a, b, period in zip(true, said, PERIODS)]
        return 1.0 - sum(errors) / 3
    if kind == "battery":
        true, said = read_battery(truth), read_battery(answer)
        return 0.0 if true is None or said is None else 1.0 - abs(true - said) / 100
    return float(truth in answer)


def is_right(truth: str, answer: str) -> bool:
    """Whether an answer is exactly right; hours count modulo 12, because 00 and 12 look the same."""
    return score(truth, answer) == 1.0


def all_questions(records: Iterable[Mapping]) -> list[Question]:
    """Every question of every "vqa" record, later ones with the true dialogue before them."""
    found = []
    for record in records:
        if record.get("task", "vqa") != "vqa":
            continue
        texts = [turn["value"] for turn in record["conversations"]]
        for i in range(0, len(texts) - 1, 2):
            attribute = attribute_of(texts[i], texts[i + 1])
            found.append(Question(record["image"], texts[i], texts[i + 1], attribute, tuple(texts[:i])))
    return found


def published_questions(records: Sequence[Mapping], limit: int = PUBLISHED_LIMIT) -> list[Question]:
    """What the published evaluation asks: the first question of the first `limit` records.

    Records whose prompt does not begin with "<" (generation) or whose answer holds a space (captions) are skipped.
    """
    found = []
    for record in records[:limit]:
        question, truth = (turn["value"] for turn in record["conversations"][:2])
        if question.startswith("<") and " " not in truth:
            found.append(Question(record["image"], question, truth, attribute_of(question, truth)))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summarise(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """{"accuracy": ..., "score": ..., "count": ...}, each by attribute; attributes that were not asked are absent.

    accuracy: weather, weather_pos, battery_pos, and time_exact, battery_exact; score: time, battery.
    """
    scores = collections.defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        scores[question.attribute].append(score(question.truth, answer))
    out = {"accuracy": {}, "score": {}, "count": {name: len(values) for name, values in sorted(scores.items())}}
    for name, values in sorted(scores.items()):
        exact = _mean([float(value == 1.0) for value in values])
        out["accuracy"][f"{name}_exact" if name in GRADED else name] = exact
        if name in GRADED:
            out["score"][name] = _mean(values)
    return out


def best_constant(truths: Sequence[str]) -> str:
    """The one answer with the highest mean score over the true answers of an attribute.

    A time's score is a sum over its three numbers, so each is chosen alone; the other kinds choose among the answers that occur.
    """
    if kind_of(truths[0]) != "time":
        counts = collections.Counter(truths)
        return max(sorted(counts), key=lambda guess: sum(n * score(truth, guess) for truth, n in counts.items()))
    best = []
    for times, period in zip(zip(*map(read_time, truths)), PERIODS):
        counts = collections.Counter(times)
        loss = [sum(n * min(abs(t - g), period - abs(t - g)) for t, n in counts.items()) for g in range(period)]
        best.append(loss.index(min(loss)))
    return "{:02d}:{:02d}:{:02d}".format(*best)


def chance(train: Sequence[Question], test: Sequence[Question]) -> dict[str, float]:
    """What an answerer that never looks would reach, with the keys of `summarise`'s accuracy and score.

    Scores of time and battery: the constant answer that scores best on the training questions, scored on the test questions.
    Accuracies: the most frequent training answer, on the test questions.
    """
    known, asked, out = collections.defaultdict(list), collections.defaultdict(list), {}
    for questions, truths in ((train, known), (test, asked)):
        for question in questions:
            truths[question.attribute].append(question.truth)
    for name, truths in sorted(asked.items()):
        seen = known[name] or truths
        commonest = collections.Counter(seen).most_common(1)[0][0]
        out[f"{name}_exact" if name in GRADED else name] = _mean(
            [float(is_right(truth, commonest)) for truth in truths]
        )
        if name in GRADED:
            constant = best_constant(seen)
            out[name] = _mean([score(truth, constant) for truth in truths])
    return out
