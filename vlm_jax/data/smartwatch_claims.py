"""Captions of smart-watches, true or wrong in one attribute, and the questions that teach a model to tell them apart.

    caption   A watch with sunny weather in the top-left corner and a battery at 62% in the bottom-right corner.
    claim     Does this figure show "a watch with cloudy weather"? Please answer yes or no.     No, or Yes of what is true
    ranking   a caption of a watch with all its facts, and the same words with one of them altered

The level of the battery is told and never altered: to read it to the percent takes longer than all else together. A wrong value is
drawn so that true and wrong ones are equally frequent in text: no caption can be told from its words alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from vlm_jax.data.smartwatch import CORNERS, WEATHERS, Watch
from vlm_jax.data.smartwatch_text import IMAGE, answer, templates

FACTS = ("weather", "weather_pos", "battery_pos")  # that are altered
TOLD = (*FACTS, "battery")
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'  # VQAScore's; a test holds both to each other
ANSWERS = {True: "Yes", False: "No"}
OPENINGS = ("a watch with", "a smart watch showing", "a watch face with")
WORDINGS = 3  # of the published wordings of each plain question


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One picture, its caption, and wrong captions by the fact that each has altered."""

    image: str
    true: str
    wrong: dict[str, str]


def altered(rng: random.Random, watch: Watch, fact: str) -> Watch:
    """The watch with another value of one of FACTS; what moves goes to a corner that is free."""
    if fact == "weather":
        value = rng.choice([w for w in WEATHERS if w != watch.weather])
    else:
        value = rng.choice([c for c in CORNERS if c not in (watch.weather_pos, watch.battery_pos)])
    return dataclasses.replace(watch, **{fact: value})


def caption(watch: Watch, facts: Sequence[str], opening: str = OPENINGS[0], battery_first: bool = False) -> str:
    """The watch in words, with `facts` (a choice of TOLD, at least one) and no others."""
    weather = f"{watch.weather} weather" if "weather" in facts else "the weather"
    battery = f"a battery at {watch.battery}%" if "battery" in facts else "the battery"
    clauses = []
    for name, words, corner in (("weather", weather, watch.weather_pos), ("battery", battery, watch.battery_pos)):
        if f"{name}_pos" in facts:
            clauses.append(f"{words} in the {corner} corner")
        elif name in facts:
            clauses.append(words)
    return f"{opening} {' and '.join(reversed(clauses) if battery_first else clauses)}"


def claims_records(rng: random.Random, watch: Watch, image: str) -> list[dict]:
    """Of one picture: its caption, two pairs of a true and a wrong claim that differ in one fact, and a plain question.

    The first pair is about one fact, which is what makes the comparison learnable, and the second as often about several.
    """
    described = caption(watch, TOLD, *_wording(rng))
    dialogues = [("caption", "", f"{described[0].upper()}{described[1:]}.")]
    for size in (1, rng.choice((1, 1, 1, 2, 3, 4))):
        facts, wording = rng.sample(FACTS if size == 1 else TOLD, size), _wording(rng)
        wrong = altered(rng, watch, rng.choice([fact for fact in facts if fact in FACTS]))
        for claimed, true in ((watch, True), (wrong, False)):
            dialogues.append(("vqa", QUESTION.format(caption(claimed, facts, *wording)), ANSWERS[true]))
    dialogues.append(("vqa", *_plain(rng, watch)))
    return [
        {"task": task, "image": image, "conversations": [
            {"from": "human", "value": IMAGE + question}, {"from": "gpt", "value": reply}
        ]}
        for task, question, reply in dialogues
    ]  # fmt: skip


def _plain(rng: random.Random, watch: Watch) -> tuple[str, str]:
    """A question that names no value, and its answer."""
    asked = rng.choice(FACTS)
    kind = "where" if asked.endswith("_pos") else "what"
    return rng.choice(templates()[kind][asked][:WORDINGS]), answer(watch, asked)


def rankings(watches: Sequence[Watch], seed: int = 0) -> list[Ranking]:
    """A Ranking of every watch, whose picture is "0.png", "1.png" ...; the same ones for the same watches and seed."""
    rng, out = random.Random(seed), []
    for i, watch in enumerate(watches):
        wording = _wording(rng)
        wrong = {fact: caption(altered(rng, watch, fact), TOLD, *wording) for fact in FACTS}
        out.append(Ranking(f"{i}.png", caption(watch, TOLD, *wording), wrong))
    return out


def _wording(rng: random.Random) -> tuple[str, bool]:
    """The last two arguments of `caption`."""
    return rng.choice(OPENINGS), rng.random() < 0.5
