"""configs/watch_score.py from end to end, shrunk to seconds: stage 1, stage 2, export, VQAScores of held-out watches, the page."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from vlm_jax import recipe as recipes
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.data.smartwatch_claims import FACTS, rankings
from vlm_jax.data.smartwatch_files import WatchSet, draw_all
from vlm_jax.evaluate.vqascore import VQAScore
from vlm_jax.quickstart import quickstart
from vlm_jax.train.command import train

pytestmark = [pytest.mark.slow, pytest.mark.long]  # CI trains and scores a CLIP-T5 in test_clip_flant5_command
ROOT = Path(__file__).resolve().parent.parent
WATCHES = 12


def config(words):
    spec = importlib.util.spec_from_file_location("watch_score", ROOT / "configs" / "watch_score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(words)


def test_stages_are_of_one_model_and_have_the_templates_of_clip_flant5():
    first, second = (recipes.from_config(config(stage)) for stage in ("stage1", "stage2"))
    assert first.model == second.model and first.model.encoder_decoder
    assert (first.data.template, second.data.template) == ("t5_plain_split_text", "t5_v1")
    assert second.init.checkpoint == f"{first.output}/export" and first.data.seed not in (
        second.data.seed,
        second.data.seed + 1,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both stages and the ranking; the folder and what quickstart returned."""
    folder = tmp_path_factory.mktemp("watch_score")
    first, second = config("stage1,smoke"), config("stage2,smoke")
    for one in (first, second):
        one.data.generated_watches = WATCHES
        one.train.steps = 2
    first.output = str(folder / "stage1")
    assert train(first) == 0
    second.init.checkpoint = str(folder / "stage1" / "export")
    assert quickstart(str(folder / "stage2"), second) == 0
    return folder, second


def test_leaves_summary_curves_and_page(runs):
    folder, _ = runs
    summary = json.loads((folder / "stage2" / "summary.json").read_text())
    assert set(summary["accuracy"]) == set(summary["chance"]) == {*FACTS, "all", "best"}
    assert summary["count"] == dict.fromkeys(FACTS, WATCHES) | {"all": 3 * WATCHES, "best": WATCHES}
    assert summary["steps"] == 4, "of both stages"
    assert 0 < summary["score"]["true"] < 1 and summary["seconds"] >= summary["training_seconds"] > 0
    page = (folder / "stage2" / "report.html").read_text()
    assert page.count("<dt>true: ") == page.count("<dt>wrong weather: ") == WATCHES
    assert (folder / "stage2" / "loss.png").stat().st_size > 1000


def test_stage_2_goes_on_from_stage_1(runs):
    """With its weights, which all move but the tower's, and its tokenizer."""
    folder, _ = runs
    first, second = (open_checkpoint(folder / stage / "export") for stage in ("stage1", "stage2"))
    assert first.naming == second.naming == "clip_t5" and first.config == second.config
    distance = {
        path: np.abs(first.read(path) - second.read(path)).max() for path in first.leaves if path.endswith("/kernel")
    }
    assert all((moved == 0) == path.startswith("tower/") for path, moved in distance.items())
    assert max(distance.values()) < 0.01, "two steps of less than 5e-4"
    tokenizers = [(folder / stage / "export" / "tokenizer.json").read_bytes() for stage in ("stage1", "stage2")]
    assert tokenizers[0] == tokenizers[1]


def test_the_summary_is_what_the_export_scores(runs):
    folder, second = runs
    seed = second.data.seed + 1
    items = rankings(draw_all(WatchSet(WATCHES, seed))[0], seed)
    score, images = VQAScore(folder / "stage2" / "export"), folder / "stage2" / "held_out" / "images"
    right = 0
    for item in items:
        true, *wrong = score(images=images / item.image, texts=[item.true, *item.wrong.values()])[0]
        right += sum(true > w for w in wrong)
    summary = json.loads((folder / "stage2" / "summary.json").read_text())
    assert summary["accuracy"]["all"] == pytest.approx(
        right / (3 * WATCHES), abs=2 / (3 * WATCHES)
    )  # near-ties may turn


def test_a_second_start_does_nothing_again(runs, capsys):
    folder, second = runs
    before = (folder / "stage2" / "summary.json").read_bytes()
    assert quickstart(str(folder / "stage2"), second) == 0
    assert "report: " in capsys.readouterr().out
    assert (folder / "stage2" / "summary.json").read_bytes() == before
