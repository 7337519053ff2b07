"""Statistics of the VQAScore benchmarks against linzhiqiu/t2v_metrics and scikit-learn."""

import json

import numpy as np
import pytest

from tests.goldens import cases
from vlm_jax.evaluate import vqascore_metrics as metrics
from vlm_jax.evaluate.vqascore_preferences import choices
from vlm_jax.evaluate.vqascore_ratings import RANKED, genai_image, ranking

TOLERANCE = 1e-9


def recorded(kind):
    """Run a test with argument `case` once per recorded case of a kind."""
    found = [
        pytest.param(case, id=f"{path.name}-{i}")
        for path in cases("clip_flant5", "metrics*.json")
        for i, case in enumerate(json.loads(path.read_text(encoding="utf-8")).get(kind, ()))
    ]

    def mark(test):
        return pytest.mark.parametrize("case", found)(test) if found else None

    return mark


def close(ours, theirs):
    theirs = np.nan if theirs is None else theirs
    assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True)


@recorded("winoground")
def test_preferences(case):
    right = metrics.preferences(np.asarray(case["scores"]))
    for kind in ("text", "image", "group"):
        close(right[kind].mean(), case[kind])


@recorded("correlation")
def test_correlations(case):
    human, score = case["human"], case["metric"]
    close(metrics.pearson(human, score), case["pearson"])
    close(metrics.kendall(human, score), case["tau_b"])
    close(metrics.kendall(human, score, "c"), case["tau_c"])
    close(metrics.accuracy_without_human_ties(human, score), case["pairwise_acc_ignore_tie"]["acc"])
    for name, value in case["kendall_variants"].items():
        variant, eps = name.split("_eps")
        if variant == "c":
            close(metrics.kendall(human, score, "c"), value)
        else:
            close(metrics.kendall_with_ties(human, score, float(eps), variant), value)
    assert [int(n[0]) for n in metrics.count_pairs(human, score)] == case["sufficient_statistics_eps0"]


@recorded("correlation")
def test_tie_optimisation(case):
    human, score = case["human"], case["metric"]
    for key, name, variant in (
        ("pairwise_acc_with_tie_optimization", "acc", "acc23"),
        ("tau_with_tie_optimization", "tau", "23"),
    ):
        best = metrics.optimise_ties(human, score, variant)
        close(best.value, case[key][name])
        close(best.threshold, case[key]["threshold"])
    thresholds, values = metrics.tie_curve(human, score)
    curve = case["optimization_curve"]
    assert len(thresholds) == curve["n"]
    n = len(curve["thresholds"])
    np.testing.assert_allclose(thresholds[:n], curve["thresholds"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(values[:n], curve["taus"], rtol=0, atol=TOLERANCE)


@recorded("grouped")
def test_rows_are_averaged(case):
    human, score = case["human"], case["metric"]
    close(metrics.kendall(human, score), case["tau_b"])
    close(metrics.kendall(human, score, "c"), case["tau_c"])
    best = metrics.optimise_ties(human, score)
    close(best.value, case["pairwise_acc_with_tie_optimization"]["acc"])
    close(best.threshold, case["pairwise_acc_with_tie_optimization"]["threshold"])


@recorded("auroc")
def test_auroc(case):
    close(metrics.auroc(case["label"], case["score"]), case["roc_auc"])


@recorded("pickapic")
def test_choices(case):
    right = choices(np.asarray(case["scores"]), np.asarray(case["labels"]))
    close(right.mean(), case["acc"])


@recorded("genai_ranking")
def test_ranking(case):
    human, score = (np.reshape(case[key], (-1, RANKED)) for key in ("human", "metric"))
    assert metrics.best_above_worst(human, score).tolist() == case["ranking_correct"]
    found = ranking("DALLE_3", human, score)["DALLE_3"]
    for key in ("pearson", "kendall_b", "ranking_accuracy"):
        close(found[key], case[key])


@recorded("genai_bench")
def test_genai_bench(case, tmp_path):
    """From its files: the order of the items, the ratings of people, the skills."""
    (tmp_path / "genai_image.json").write_text(json.dumps(case["dataset"]))
    (tmp_path / "genai_skills.json").write_text(json.dumps(case["skills"]))
    benchmark = genai_image(tmp_path)
    order = [item.images[0].path for item in benchmark.items]
    assert order == [str(tmp_path / model / f"{key}.jpeg") for key, model in case["item_order"]]
    found = benchmark.numbers([np.full((1, 1), score) for score in case["scores"]])
    for row, want in {"all": case["overall"], **case["per_skill"]}.items():
        close(found[row]["pearson"], want["pearson"])
        close(found[row]["kendall_b"], want["kendall_b"])
        close([found[row]["pairwise_accuracy"], found[row]["tie_threshold"]], want["pairwise_acc"])
