"""How well a model tells true captions of held-out smart-watches from wrong ones: by VQAScore, pair by pair.

    accuracy[fact]   share of watches whose true caption scores higher than the one with that fact altered    chance 1/2
    accuracy[all]    the mean of these; [best]: share whose true caption scores highest of all                chance 1/2, 1/4
    score            mean scores of true and of wrong captions

A tie is no success. Truths and altered facts are equally frequent, so that a model that never looks is at chance.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data.smartwatch_claims import FACTS, Ranking
from vlm_jax.evaluate.vqascore import VQAScore


def rank(score: VQAScore, rankings: Sequence[Ranking], images: Path) -> dict[str, Any]:
    """accuracy, score, chance and count as above, and `answers`: one dict for every caption.

    images: the folder of the pictures. An answer has image, caption, attribute (the altered fact, "" if true), value (its VQAScore)
    and right (scores below the true caption; of the true one: above all others).
    """
    captions = [[item.true, *item.wrong.values()] for item in rankings]
    found = score.items([([images / item.image], texts) for item, texts in zip(rankings, captions)])
    answers = []
    for item, texts, values in zip(rankings, captions, found):
        true, *wrong = map(float, values[0])
        right = [all(true > other for other in wrong), *(true > other for other in wrong)]
        for fact, text, value, is_right in zip(("", *item.wrong), texts, (true, *wrong), right):
            answers.append({"image": item.image, "caption": text, "attribute": fact, "value": value, "right": is_right})
    return {**summarise(answers), "answers": answers}


def summarise(answers: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The numbers of the module docstring from the answers of `rank`."""
    pairs = [a for a in answers if a["attribute"]]
    true = [a for a in answers if not a["attribute"]]
    facts = [fact for fact in FACTS if any(a["attribute"] == fact for a in pairs)]
    right = {fact: [a["right"] for a in pairs if a["attribute"] == fact] for fact in facts}
    accuracy = {fact: statistics.fmean(right[fact]) for fact in facts}
    accuracy["all"] = statistics.fmean(a["right"] for a in pairs)
    accuracy["best"] = statistics.fmean(a["right"] for a in true)
    means = {"true": statistics.fmean(a["value"] for a in true), "wrong": statistics.fmean(a["value"] for a in pairs)}
    chance = dict.fromkeys((*facts, "all"), 0.5) | {"best": len(true) / len(answers)}
    count = {fact: len(right[fact]) for fact in facts} | {"all": len(pairs), "best": len(true)}
    return {"accuracy": accuracy, "score": means, "chance": chance, "count": count}


def table(result: dict[str, Any]) -> str:
    """Accuracy, chance and number of pairs by altered fact, a line each, and the mean scores."""
    lines = [f"{'altered':<16}{'result':>8}{'chance':>8}{'pairs':>8}"]
    for name, value in result["accuracy"].items():
        lines.append(f"{name:<16}{value:8.3f}{result['chance'][name]:8.3f}{result['count'][name]:8d}")
    means = result["score"]
    return "\n".join(
        [*lines, f"mean VQAScore of true captions {means['true']:.3f}, of wrong ones {means['wrong']:.3f}"]
    )
