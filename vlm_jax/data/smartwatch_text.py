"""Conversations about a smart-watch: the three published tasks and the quickstart's five questions in a row.

    {"task": t, "image": "7.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}

Tasks of the published data, in this order for every picture: "generation" (text to picture), "vqa" (one to four short
questions), "caption". The quickstart style has one record per picture, task "vqa", with all five attributes asked.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

ATTRIBUTES = ("weather_pos", "battery_pos", "weather", "battery", "time")
STYLES = ("published", "rounds", "claims")
KINDS = ("what", "what", "what", "where", "where")
ASKED = {"what": ("weather", "time", "battery"), "where": ("battery_pos", "weather_pos")}
EXTRA_ROUNDS = 3
EXTRA_PROBABILITY = 0.4
IMAGE = "<image>\n"


@functools.cache
def templates() -> dict:
    """The published wordings: `what`/`where` questions by attribute, `caption` pieces and their probabilities."""
    return json.loads(Path(__file__).with_name("smartwatch_templates.json").read_text(encoding="utf-8"))


def answer(watch, attribute: str) -> str:
    """The true answer: a weather word, "HH:MM:SS", "62%" or a corner."""
    if attribute == "battery":
        return f"{watch.battery}%"
    return getattr(watch, attribute)


def _kind(attribute: str) -> str:
    return "where" if attribute.endswith("_pos") else "what"


def _turns(question: str, reply: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]


def _caption(rng: random.Random, watch, bases: list[str]) -> str:
    """A base and a random subset of attribute phrases: "There is a watch on the image, displaying 06:48:56."."""
    table = templates()
    text = rng.choice(bases)
    kept = [name for name, p in table["caption_attribute_probability"].items() if rng.random() < p]
    for name in kept:
        text += rng.choice(table["caption"][name]).format(getattr(watch, name))
    return text.replace("  ", " ").capitalize() + "."


def _generation(rng: random.Random, watch) -> list[dict]:
    pieces = templates()["caption"]
    request = _caption(rng, watch, pieces["generation_q"])
    return _turns(request, rng.choice(pieces["generation_a"]))


def _pair(rng: random.Random, watch) -> list[dict]:
    kind = rng.choice(KINDS)
    attribute = rng.choice(ASKED[kind])
    return _turns(rng.choice(templates()[kind][attribute]), answer(watch, attribute))


def _vqa(rng: random.Random, watch) -> list[dict]:
    turns = _pair(rng, watch)
    for _ in range(EXTRA_ROUNDS):
        if rng.random() < EXTRA_PROBABILITY:
            turns += _pair(rng, watch)
    turns[0]["value"] = IMAGE + turns[0]["value"]
    return turns


def _description(rng: random.Random, watch) -> list[dict]:
    pieces = templates()["caption"]
    question = rng.choice(pieces["caption_q"])
    return _turns(question, _caption(rng, watch, pieces["caption_a"]))


def published_records(rng: random.Random, watch, image: str) -> list[dict]:
    """The three records of one picture; `rng` is read in the published order."""
    tasks = (("generation", _generation), ("vqa", _vqa), ("caption", _description))
    return [{"task": task, "image": image, "conversations": build(rng, watch)} for task, build in tasks]


def rounds_records(rng: random.Random, watch, image: str, wordings: int = 10) -> list[dict]:
    """One record that asks every attribute once, in random order, so that any question may come first.

    wordings: how many of the published wordings of each question are used (the first ones).
    """
    turns = []
    for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES)):
        questions = templates()[_kind(attribute)][attribute][:wordings]
        turns += _turns(rng.choice(questions), answer(watch, attribute))
    turns[0]["value"] = IMAGE + turns[0]["value"]
    return [{"task": "vqa", "image": image, "conversations": turns}]
