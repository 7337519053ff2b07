"""Model FLOPs against LLaVA-1.5's table, and the rules: real work only, peaks from a table, no guess."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.small_runs import EXACT, MODEL, PLANS, VIEWS, row
from vlm_jax.config import LLMConfig, LoRAConfig, QuantConfig, VisionConfig, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.train import flops
from vlm_jax.train import state as states
from vlm_jax.train.metrics import Speed
from vlm_jax.train.options import LORA, STAGE1, STAGE2
from vlm_jax.train.step import row_counts

SEVEN = VLMConfig()
THIRTEEN = VLMConfig(llm=LLMConfig(width=5120, mlp=13824, layers=40, heads=40, kv_heads=40))


def cost(config, patterns):
    return flops.training_cost(config, states.select(patterns, vlm.shapes(config)))


# one sample with one image and this many real slots: TFLOP, as published analyses of LLaVA-1.5 give it
TABLE = [
    (SEVEN, STAGE2, 750, 30.6), (SEVEN, STAGE2, 850, 34.7),
    (SEVEN, STAGE2, 950, 38.8), (SEVEN, STAGE1, 610, 16.9),
    (THIRTEEN, STAGE2, 750, 59.0), (THIRTEEN, STAGE2, 850, 66.9),
    (THIRTEEN, STAGE2, 950, 74.8), (THIRTEEN, STAGE1, 610, 32.3),
]  # fmt: skip


@pytest.mark.parametrize("config, patterns, slots, wanted", TABLE)
def test_cost_of_a_sample(config, patterns, slots, wanted):
    total = cost(config, patterns).total(slots, flops.causal_pairs([slots]), 1)
    assert round(total / 1e12, 1) == wanted


def test_parts_of_the_table():
    assert round(cost(SEVEN, STAGE2).slot / 6 / 1e9, 3) == round(6.476 + 0.131, 3)
    frozen_tower = flops.training_cost(SEVEN, {"llm/head/kernel"}).view
    projector = 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert round((frozen_tower - projector) / 1e12, 3) == 0.366  # 23 of 24 layers
    all_layers = VLMConfig(vision=VisionConfig(feature_layers=(-1,)))
    assert round((flops.training_cost(all_layers, {"llm/head/kernel"}).view - projector) / 1e12, 3) == 0.382


def test_attention_counts_segments_and_not_the_row():
    assert flops.causal_pairs([100, 100]) == flops.causal_pairs([200]) / 2
    rng = np.random.default_rng(0)
    rows = [row(rng, plan) for plan in PLANS]
    batch = {key: np.stack([r[key] for r in rows])[None] for key in rows[0]}
    counts = jax.tree.map(float, row_counts(batch, MODEL.vision.features))
    samples = [sample for plan in PLANS for sample in plan]
    assert counts["samples"] == len(samples)
    assert counts["slots"] == sum(length for length, _ in samples)
    assert counts["views"] == sum(views for _, views in samples) < VIEWS * len(PLANS)
    assert counts["pairs"] == flops.causal_pairs(length for length, _ in samples)


def test_padding_costs_nothing():
    rng = np.random.default_rng(0)
    one, wide = row(rng, [(9, 1)], slots=12), row(np.random.default_rng(0), [(9, 1)], slots=24)
    count = [row_counts({k: v[None, None] for k, v in r.items()}, MODEL.vision.features) for r in (one, wide)]
    assert jax.tree.map(float, count[0]) == jax.tree.map(float, count[1])


def test_an_image_newline_is_no_view():
    rng = np.random.default_rng(0)
    r = row(rng, [(12, 1)])
    r["image_slots"][5] = VIEWS * MODEL.vision.features
    assert float(row_counts({k: v[None, None] for k, v in r.items()}, MODEL.vision.features)["views"]) == 1


def test_gradients_that_do_not_exist_cost_nothing():
    only_head = flops.training_cost(SEVEN, {"llm/head/kernel"})
    body, head = 6.476e9, 0.131072e9
    assert round(only_head.slot / 1e9, 1) == round((2 * body + 4 * head) / 1e9, 1)
    assert only_head.pair == cost(SEVEN, STAGE2).pair / 3
    tower_too = cost(SEVEN, ("^tower/", *STAGE2))
    assert round((tower_too.view - 6 * 576 * (1024 * 4096 + 4096 * 4096)) / 1e12, 2) == round(3 * 0.366, 2)


@pytest.mark.parametrize("kind, peak", [
    ("NVIDIA H200", 989.5e12), ("NVIDIA H100 80GB HBM3", 989.5e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v6e", 918e12),
    ("cpu", None), ("NVIDIA H100 PCIe", None), ("TPU v4 lite", None), ("NVIDIA GeForce RTX 4090", None),
])  # fmt: skip
def test_peak(kind, peak):
    assert flops.peak_flops(kind) == peak


def test_unknown_device_reports_no_utilisation():
    step = {"slots": 1000.0, "pairs": 5e4, "views": 2.0, "samples": 4.0}
    one = flops.Cost(6e9, 1e6, 3e11)
    rates = Speed(one, 2, "cpu").window([step, step], seconds=4.0, waited=1.0)
    assert "mfu" not in rates and rates["data_stall"] == 0.25 and rates["tokens_per_second"] == 500
    assert rates["tflops_per_second_per_device"] == pytest.approx(2 * one.total(1000, 5e4, 2) / 4 / 2 / 1e12)
    known = Speed(one, 2, "TPU v5p").window([step, step], seconds=4.0, waited=1.0)
    assert known["mfu"] == pytest.approx(rates["tflops_per_second_per_device"] * 1e12 / 459e12)


def test_trained_biases_and_norms_are_free():
    assert cost(MODEL, EXACT.trainable) == flops.training_cost(
        dataclasses.replace(MODEL),
        {p for p in states.select(EXACT.trainable, vlm.shapes(MODEL)) if p.endswith("kernel")},
    )


LORA_7B = dataclasses.replace(SEVEN, lora=(LoRAConfig(("^llm/blocks/",), rank=128),))


def test_frozen_kernels_cost_two_thirds_and_adapters_are_part_of_the_model():
    """2 forward and 2 for the gradient of the input per frozen weight, 6 per weight of an adapter; pairs as in full training."""
    body, head, adapters = 32 * 202_375_168, 32000 * 4096, 319_815_680
    one, full = cost(LORA_7B, LORA), cost(SEVEN, STAGE2)
    assert one.slot == 4 * (body + head) + 6 * adapters
    assert one.pair == full.pair and one.view == full.view
    assert full.slot == 6 * (body + head)
    assert one.slot / full.slot < 0.72


def test_quantisation_changes_no_flops():
    four_bits = dataclasses.replace(LORA_7B, quant=QuantConfig())
    assert cost(four_bits, LORA) == cost(LORA_7B, LORA)


def test_adapters_of_the_tower_send_gradients_through_it():
    group = LoRAConfig(("^tower/blocks/",), rank=64)
    tower = dataclasses.replace(SEVEN, lora=(group,))
    weights = 23 * (4 * 1024**2 + 2 * 1024 * 4096)
    pairs = 23 * (4 * 2 * 64 * 1024 + 2 * 64 * (1024 + 4096))
    patch, scores = 14 * 14 * 3 * 1024, 4 * 23 * 577**2 * 1024
    projector = 576 * (1024 * 4096 + 4096 * 4096)
    view = cost(tower, LORA).view
    assert view == 577 * (4 * weights + 6 * pairs) + 576 * 4 * patch + 3 * scores + 6 * projector
    frozen = cost(tower, STAGE1).view  # adapters there, but not trained: forward only
    assert frozen == 577 * 2 * (weights + pairs) + 576 * 2 * patch + scores + 6 * projector
