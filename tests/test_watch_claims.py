"""Captions of watches that are true or wrong in one fact: what they say, that words give nothing away, how they are ranked and shown."""

import collections
import dataclasses
import random
import re

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.generated import make_watch_data
from vlm_jax.data.options import DataConfig
from vlm_jax.data.records import Record
from vlm_jax.data.smartwatch import CORNERS, WEATHERS, Watch, sample_watch
from vlm_jax.data.smartwatch_claims import (
    ANSWERS,
    FACTS,
    QUESTION,
    TOLD,
    altered,
    caption,
    claims_records,
    rankings,
)
from vlm_jax.data.smartwatch_files import WatchSet, draw_all
from vlm_jax.data.t5_text import T5Format
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.evaluate import report, vqascore, watch_claims
from vlm_jax.generate.scoring import encode_apart

WATCH = Watch(3, 0, 30, (250, 10, 10), "sunny", 62, "top-left", "bottom-right")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            TOLD,
            "a watch with sunny weather in the top-left corner and a battery at 62% in the bottom-right corner",
        ),
        (("weather",), "a watch with sunny weather"),
        (
            ("weather_pos", "battery"),
            "a watch with the weather in the top-left corner and a battery at 62%",
        ),
        (("battery_pos",), "a watch with the battery in the bottom-right corner"),
    ],
)
def test_a_caption_has_the_facts_it_is_given(facts, words):
    assert caption(WATCH, facts) == words
    reversed_ = caption(WATCH, facts, battery_first=True)
    assert sorted(reversed_.split()) == sorted(words.split())


@pytest.mark.parametrize("fact", FACTS)
def test_altering_changes_one_fact_and_words_do_not_tell_which_is_true(fact):
    """Over all watches a value is as often the wrong one as the true one, given the other facts."""
    rng, true, wrong = random.Random(0), collections.Counter(), collections.Counter()
    for _ in range(20000):
        watch = sample_watch(rng)
        other = altered(rng, watch, fact)
        assert dataclasses.replace(other, **{fact: getattr(watch, fact)}) == watch
        assert other.weather_pos != other.battery_pos
        rest = {"weather_pos": watch.battery_pos, "battery_pos": watch.weather_pos}.get(fact, "")
        before, after = getattr(watch, fact), getattr(other, fact)
        assert before != after
        true[before, rest] += 1
        wrong[after, rest] += 1
    values = len(WEATHERS) if fact == "weather" else len(CORNERS) * (len(CORNERS) - 1)
    assert len(true) == len(wrong) == values
    spread = 6 * (20000 / values) ** 0.5  # six standard deviations
    assert all(abs(true[key] - wrong[key]) < spread for key in true)


def test_records_of_a_watch_are_a_caption_two_pairs_of_claims_and_a_question():
    rng, sizes = random.Random(1), collections.Counter()
    for _ in range(100):
        watch = sample_watch(rng)
        records = claims_records(rng, watch, "7.png")
        assert [r["task"] for r in records] == ["caption"] + ["vqa"] * 5 and {r["image"] for r in records} == {"7.png"}
        dialogues = [[turn["value"] for turn in r["conversations"]] for r in records]
        assert all(question.startswith("<image>\n") for question, _ in dialogues)
        told = (watch.weather, watch.weather_pos, f"{watch.battery}%", watch.battery_pos)
        assert all(value in dialogues[0][1] for value in told) and dialogues[5][1] in told[:2] + told[3:]
        for (true, yes), (wrong, no) in (dialogues[1:3], dialogues[3:5]):
            assert (yes, no) == (ANSWERS[True], ANSWERS[False])
            differing = [(a, b) for a, b in zip(true.split(), wrong.split(), strict=True) if a != b]
            assert len(differing) == 1 and differing[0][0].strip('"?') in told, (
                "one word, in which the true claim is right"
            )
            sizes[sum(f" {value}" in true for value in told)] += 1
    assert sizes[1] > 100 and all(sizes[n] > 5 for n in (2, 3, 4))


def test_claims_are_asked_as_vqascore_asks():
    assert QUESTION == vqascore.QUESTION
    assert (ANSWERS[True], ANSWERS[False]) == (vqascore.ANSWER, vqascore.AGAINST)


def test_a_claim_has_the_tokens_in_training_that_it_has_in_scoring(tmp_path):
    """And the captions of stage 1 have the tokenizer of the questions of stage 2: nothing is unknown, and few pieces."""
    data = DataConfig(generated_watches=8, generated_task="claim_captions", template="t5_plain_split_text")
    make_watch_data(tmp_path / "first", data, 640)
    make_watch_data(tmp_path / "second", dataclasses.replace(data, generated_task="claims", template="t5_v1"), 640)
    first, second = (load_tokenizer(tmp_path / folder) for folder in ("first", "second"))
    assert first.fingerprint == second.fingerprint
    _, records = draw_all(WatchSet(8, style="claims"))
    for raw in records:
        turns = tuple((turn["from"], turn["value"]) for turn in raw["conversations"])
        if raw["task"] == "caption":
            continue
        sample = T5Format(first, "t5_v1")(Record("0", turns, ("0.png",)))
        tokens, said = encode_apart(first, "t5_chat", turns[0][1].removeprefix("<image>\n"), turns[1][1])
        np.testing.assert_array_equal(sample.tokens, tokens)
        np.testing.assert_array_equal(sample.answer, said)


def test_rankings_follow_from_the_watches_and_the_seed():
    watches, _ = draw_all(WatchSet(40, seed=1))
    items = rankings(watches, 1)
    assert items == rankings(watches, 1) != rankings(watches, 2)
    for i, (watch, item) in enumerate(zip(watches, items, strict=True)):
        assert item.image == f"{i}.png" and tuple(item.wrong) == FACTS
        assert all(
            value in item.true for value in (watch.weather, watch.weather_pos, f"{watch.battery}%", watch.battery_pos)
        )
        for text in item.wrong.values():
            assert sum(a != b for a, b in zip(item.true.split(), text.split(), strict=True)) == 1


class Reader:
    """A VQAScore that knows the watches; `blind` to one fact, of which it says that any value is true."""

    def __init__(self, watches, blind=""):
        self.watches, self.blind = watches, blind

    def items(self, items):
        return [
            np.array([[self.one(self.watches[int(images[0].stem)], text) for text in texts]]) for images, texts in items
        ]

    def one(self, watch, text):
        corners = re.search(r"weather in the (\S+) ", text)[1], re.search(r"% in the (\S+)", text)[1]
        found = {"weather": watch.weather in text, "weather_pos": corners[0] == watch.weather_pos,
                 "battery_pos": corners[1] == watch.battery_pos}  # fmt: skip
        return 0.1 + 0.8 * all(right for fact, right in found.items() if fact != self.blind)


def test_ranking_counts_pairs_by_fact_and_ties_as_wrong(tmp_path):
    watches, _ = draw_all(WatchSet(10, seed=1))
    items = rankings(watches, 1)
    result = watch_claims.rank(Reader(watches), items, tmp_path)
    assert set(result["accuracy"].values()) == {1.0}
    assert result["count"] == dict.fromkeys(FACTS, 10) | {"all": 30, "best": 10}
    assert result["chance"] == dict.fromkeys((*FACTS, "all"), 0.5) | {"best": 0.25}
    assert result["score"] == {"true": pytest.approx(0.9), "wrong": pytest.approx(0.1)}
    result = watch_claims.rank(Reader(watches, blind="battery_pos"), items, tmp_path)
    assert result["accuracy"] == {
        "weather": 1,
        "weather_pos": 1,
        "battery_pos": 0,
        "all": pytest.approx(2 / 3),
        "best": 0,
    }
    assert "battery_pos        0.000   0.500      10" in watch_claims.table(result)


def test_the_page_shows_captions_with_their_scores(tmp_path):
    watches, _ = draw_all(WatchSet(2, seed=1))
    answers = watch_claims.rank(Reader(watches, blind="weather"), rankings(watches, 1), tmp_path)["answers"]
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / f"{i}.png")
    before = [{"step": i, "loss": 2.0, "token_accuracy": 0.1} for i in (1, 2)]
    report.draw_curves([{"step": 1, "loss": 1.0, "token_accuracy": 0.5}], tmp_path / "loss.png", before)
    summary = {
        "parameters": 1, "steps": 3, "training_seconds": 1.0, "tokens_per_second": 1.0, "seconds": 1.0, "data_stall": 0.0,
        **watch_claims.summarise(answers),
    }  # fmt: skip
    report.write_page(tmp_path / "report.html", summary, answers, tmp_path / "images", tmp_path / "loss.png")
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("wrong weather: ") == page.count("wrong position of the battery: ") == page.count("<dt>true: ") == 2
    )
    assert (
        page.count('<dd class="wrong">') == 4 and page.count('<dd class="right">') == 4
    )  # the true ones are not above the weather
    assert "VQAScores of their captions" in page and "0.900" in page and "true caption above all others" in page
