"""The smart-watch benchmark: every question about every held-out watch, scored by `watch` and shown beside what guessing gives.

data     a folder with records.json (or train.json) and images/, or such a JSON file with images/ beside it
history  what stands before the later questions of a dialogue: "true" answers, the model's "own", or "none" (the image and the question)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.config import UserError, one_of
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.smartwatch_text import IMAGE
from vlm_jax.evaluate import watch
from vlm_jax.evaluate.query import Query

MAX_NEW_TOKENS = 128
HISTORIES = ("true", "own", "none")

Answer = Callable[[Sequence[Query], int], list[str]]


def smartwatch(
    answer: Answer, data: Path, limit: int = 0, history: str = "true", reference: Sequence[dict] = ()
) -> dict[str, Any]:
    """Scores and answers. limit: first records only, 0 is all; reference: training records, from which the best guesses are taken.

    Returns accuracy, score, chance and count by attribute (see watch.summarise) and `answers`, one dict per question.
    """
    one_of("--history", history, HISTORIES)
    records, folder = read_records(data)
    questions = watch.all_questions(records[:limit] if limit else records)
    if not questions:
        raise UserError(f"{data} has no record of task vqa: there is nothing to ask")
    answers = ask(answer, questions, folder, history)
    result: dict[str, Any] = {"history": history, **watch.summarise(questions, answers)}
    result["chance"] = watch.chance(watch.all_questions(reference), questions)
    result["answers"] = [
        {
            "image": q.image, "question": q.text.removeprefix(IMAGE), "attribute": q.attribute, "truth": q.truth, "answer": a,
            "right": watch.is_right(q.truth, a), "score": watch.score(q.truth, a),
        }
        for q, a in zip(questions, answers)
    ]  # fmt: skip
    return result


def ask(answer: Answer, questions: Sequence[watch.Question], folder: Path, history: str) -> list[str]:
    """The answers in order; with the model's own history one round of all dialogues after another."""
    answers: list[str] = [""] * len(questions)
    if history != "own":
        earlier = [q.turns if history == "true" else () for q in questions]
        return answer([_query(q, turns, folder) for q, turns in zip(questions, earlier)], MAX_NEW_TOKENS)
    for round_ in range(1 + max(len(q.turns) for q in questions) // 2):
        now = [i for i, q in enumerate(questions) if len(q.turns) == 2 * round_]
        # questions of a dialogue follow each other, so the round before is one place back
        said = {i: [t for k in range(round_, 0, -1) for t in (questions[i - k].text, answers[i - k])] for i in now}
        for i, text in zip(now, answer([_query(questions[i], said[i], folder) for i in now], MAX_NEW_TOKENS)):
            answers[i] = text
    return answers


def _query(question: watch.Question, turns: Sequence[str], folder: Path) -> Query:
    return Query((*turns, question.text), (ImageSource(str(folder / question.image), f"question {question.text!r}"),))


def read_records(data: Path) -> tuple[list[dict], Path]:
    """(records, image folder) of a data set on disk."""
    files = [data / name for name in ("records.json", "train.json")] if data.is_dir() else [data]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise UserError(
            f"{data} holds no smart-watch records: give a folder with records.json and images, or the JSON file"
        )
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    for number, record in enumerate(records if isinstance(records, list) else [None]):
        if not _is_dialogue(record):
            raise UserError(
                f"{file}: record {number} is no smart-watch record: it needs `image` and `conversations` with text in `value`"
            )
    return records, file.parent / "images"


def _is_dialogue(record: Any) -> bool:
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("conversations"), list)
        or not isinstance(record.get("image"), str)
    ):
        return False
    return all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in record["conversations"])


def table(result: dict[str, Any]) -> str:
    """Accuracy, score and chance by attribute, a line each."""
    chance = result["chance"]
    lines = [f"{'':<16}{'result':>8}{'chance':>8}"]
    for kind in ("accuracy", "score"):
        for name, value in result[kind].items():
            guess = f"{chance[name]:8.3f}" if name in chance else " " * 8
            lines.append(
                f"{kind + ' ' if kind == 'score' else ''}{name:<{16 if kind == 'accuracy' else 10}}{value:8.3f}{guess}"
            )
    return "\n".join(lines)
