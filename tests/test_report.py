"""The quickstart's page: self-contained, nothing of the answers lost, text escaped."""

import re

import pytest
from PIL import Image

from vlm_jax.evaluate import report

SUMMARY = {
    "parameters": 1234567, "steps": 10, "training_seconds": 3.2, "tokens_per_second": 999.0, "seconds": 12.0, "data_stall": 0.0123,
    "accuracy": {"battery_exact": 0.5, "weather": 1.0}, "score": {"time": 0.75}, "chance": {"weather": 0.33, "time": 0.5},
}  # fmt: skip


@pytest.fixture
def page(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / name)
    lines = [{"step": i, "loss": 2.0 / i, "token_accuracy": i / 10} for i in range(1, 10)]
    report.draw_curves(lines, tmp_path / "loss.png")
    answers = [
        {"image": "0.png", "question": "Is 1 < 2?", "answer": "yes", "truth": "yes", "right": True, "score": 1.0},
        {"image": "1.png", "question": "What?", "answer": "<b>", "truth": "no & never", "right": False, "score": 0.25},
    ]  # fmt: skip
    report.write_page(tmp_path / "report.html", SUMMARY, answers, tmp_path / "images", tmp_path / "loss.png")
    return (tmp_path / "report.html").read_text()


def test_everything_is_inside(page):
    sources = re.findall(r'src="(.*?)"', page)
    assert len(sources) == 3 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not re.search(r"https?://|<link|<script", page)


def test_answers_and_truth_are_shown_and_escaped(page):
    assert (
        "Is 1 &lt; 2?" in page
        and "&lt;b&gt;" in page
        and "no &amp; never" in page
        and "<b>" not in re.sub(r'<b style="left.*?</b>', "", page)
    )
    assert "1.2% of it waiting for data" in page
    assert page.count('class="right"') == 1 and page.count('class="wrong"') == 1


def test_rows_show_chance_where_it_is_known():
    assert report.summary_rows(SUMMARY) == [
        ("weather", "accuracy", 1.0, 0.33), ("battery, exact", "accuracy", 0.5, None), ("time", "score", 0.75, 0.5),
    ]  # fmt: skip


def test_curves_are_a_picture(tmp_path):
    report.draw_curves([{"step": 1, "loss": 1.0, "token_accuracy": 0.1}], tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 500
