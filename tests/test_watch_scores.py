"""Scores of smart-watch answers (specs of arXiv 2505.23043's evaluator, mended) and of guessing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_jax.data.smartwatch_files import WatchSet, draw_all
from vlm_jax.evaluate.watch import (
    Question,
    all_questions,
    attribute_of,
    best_constant,
    chance,
    is_right,
    published_questions,
    score,
    summarise,
)

TIMES = st.builds("{:02d}:{:02d}:{:02d}".format, st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("06:48:56", "06:48:56", 1.0),
        ("00:10:00", "It is 12:10:00.", 1.0),
        ("11:59:30", "00:00:00", 1 - (1 / 6 + 1 / 30 + 1) / 3),
        ("03:39:00", "27:99:00", 1.0),
        ("06:00:00", "no idea", 0.0),
        ("62%", "62%", 1.0),
        ("62%", "about 50% left", 0.88),
        ("100%", "0%", 0.0),
        ("7%", "07%", 0.0),
        ("5%", "five", 0.0),
        ("sunny", "It is sunny.", 1.0),
        ("top-left", "top-right", 0.0),
    ],
)
def test_score(truth, answer, expected):
    assert score(truth, answer) == pytest.approx(expected)


@given(TIMES, TIMES)
def test_time_score_is_a_symmetric_similarity(a, b):
    assert 0 <= score(a, b) <= 1
    assert score(a, b) == pytest.approx(score(b, a))
    assert score(a, a) == 1 and is_right(a, a)


def test_attributes_come_from_truth_and_wording():
    assert attribute_of("<image>\nWhere is the battery displayed?", "top-left") == "battery_pos"
    assert attribute_of("In which corner is the weather?", "top-left") == "weather_pos"
    assert attribute_of("Which corner?", "top-left") == "position"
    assert attribute_of("What is the watch showing?", "06:48:56") == "time"


def test_published_questions_are_the_first_of_each_short_record():
    _, records = draw_all(WatchSet(40, style="published"))
    asked = published_questions(records, 60)
    assert len(asked) == 20
    assert all(q.text.startswith("<image>\n") and " " not in q.truth and not q.turns for q in asked)


def test_rounds_give_five_questions_with_their_history():
    _, records = draw_all(WatchSet(2))
    asked = all_questions(records)
    assert {q.attribute for q in asked[:5]} == {"weather_pos", "battery_pos", "weather", "battery", "time"}
    assert [len(q.turns) for q in asked[:5]] == [0, 2, 4, 6, 8]
    assert asked[2].turns[1] == asked[0].truth


def test_true_answers_are_perfect_and_absent_attributes_are_no_division_by_zero():
    _, records = draw_all(WatchSet(30))
    asked = all_questions(records)
    result = summarise(asked, [q.truth for q in asked])
    assert set(result["accuracy"]) == {"weather", "weather_pos", "battery_pos", "time_exact", "battery_exact"}
    assert set(result["score"]) == {"time", "battery"}
    assert {*result["accuracy"].values(), *result["score"].values()} == {1.0}
    only = [q for q in asked if q.attribute == "weather"]
    assert summarise(only, ["snow"] * len(only)) == {
        "accuracy": {"weather": 0.0},
        "score": {},
        "count": {"weather": 30},
    }


def test_chance_is_what_the_best_constant_answer_scores():
    _, records = draw_all(WatchSet(2000, seed=1))
    asked = all_questions(records)
    level = chance(asked[:5000], asked[5000:])
    assert set(level) == {"weather", "weather_pos", "battery_pos", "time", "time_exact", "battery", "battery_exact"}
    assert level["weather"] == pytest.approx(1 / 3, abs=0.05)
    assert level["weather_pos"] == pytest.approx(1 / 4, abs=0.05)
    assert level["time"] == pytest.approx(0.5, abs=0.03)
    assert level["battery"] == pytest.approx(0.75, abs=0.02)
    assert level["battery_exact"] < 0.05


@given(st.lists(TIMES, min_size=1, max_size=8))
def test_no_time_that_occurs_beats_the_best_constant(times):
    best = best_constant(times)
    for other in times:
        assert sum(score(t, other) for t in times) <= sum(score(t, best) for t in times) + 1e-9


def test_a_question_keeps_its_image():
    record = {
        "image": "3.png",
        "conversations": [{"from": "human", "value": "<image>\nHow?"}, {"from": "gpt", "value": "sunny"}],
    }
    assert all_questions([record]) == [Question("3.png", "<image>\nHow?", "sunny", "weather")]
