"""Learning rates of HF's scheduler with warm-up ratio, at every update."""

import json

import pytest

from tests.goldens import cases
from vlm_jax.train.optimizer import rate_factor
from vlm_jax.train.options import Compat, TrainConfig

CASES = [(path, i) for path in cases("llava", "lr_schedule*.json") for i in range(len(json.loads(path.read_text())))]


@pytest.mark.parametrize("path, index", CASES, ids=[f"{path.stem}-{index}" for path, index in CASES])
def test_rates(path, index):
    case = json.loads(path.read_text())[index]
    kind = case.get("schedule", "cosine")
    config = TrainConfig(
        lr=case["lr"], warmup_ratio=case["warmup_ratio"], schedule=kind, compat=Compat(zero_first_lr=True)
    )
    total = case["total_steps"]
    rates = [config.lr * rate_factor(config, update, total) for update in range(total + 1)]
    assert rates[:-1] == pytest.approx(case["lr_used_at_step"], rel=1e-9, abs=1e-18)
    assert rates[-1] == pytest.approx(case["lr_after_last"], abs=1e-18)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_without_the_quirk_no_update_is_void(kind):
    config = TrainConfig(lr=1.0, warmup_steps=3, schedule=kind)
    rates = [rate_factor(config, update, 10) for update in range(10)]
    assert min(rates) > 0 and max(rates) == 1.0 and rates[2] == 1.0
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert kind == "constant" or rates[2:] == sorted(rates[2:], reverse=True)


def test_wsd_is_constant_until_its_last_part():
    config = TrainConfig(lr=1.0, warmup_steps=2, schedule="wsd", decay_ratio=0.4)
    rates = [rate_factor(config, update, 10) for update in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
