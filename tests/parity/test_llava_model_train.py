"""Updates of the original trainer: losses, learning rates, gradient norms and weights, micro-batches averaged
as HF does.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_model
from tests.goldens import GOLDENS, cases
from vlm_jax.train import optimizer
from vlm_jax.train.options import STAGE1, STAGE2, Compat, TrainConfig
from vlm_jax.train.state import assemble, select
from vlm_jax.train.step import make_step, split_micro_batches

CASES = cases("llava_model", "train_*.npz")


def recipe(info: dict, trainable: tuple[str, ...]) -> TrainConfig:
    """The hyperparameters of a golden."""
    hyper = info["hyper"]
    projector_lr = hyper.get("mm_projector_lr")
    return TrainConfig(
        trainable=trainable,
        steps=hyper["steps"],
        accum=hyper.get("grad_accum", 1),
        lr=hyper["lr"],
        weight_decay=hyper["wd"],
        group_lrs=((r"^projector/", projector_lr),) if projector_lr is not None else (),
        warmup_ratio=hyper["warmup_ratio"],
        clip_norm=hyper.get("max_grad_norm"),
        dtype="float32",
        vision_dtype="float32",
        frozen_dtype="float32",
        remat="full",
        loss_chunk=16,
        compat=Compat(loss_normalisation="per_microbatch", zero_first_lr=True),
    )


def micro_batches(config, z) -> list[dict[str, np.ndarray]]:
    """The golden's micro-batches as row batches of one shape."""
    rows = []
    for i in range(sum(name.endswith("_input_ids") for name in z.files)):
        ids, labels, images = (z[f"b{i}_{part}"] for part in ("input_ids", "labels", "images"))
        views, sizes = golden_model.assign_images(ids, ids != 0, images)
        rows.append(golden_model.row_batch(config, ids, ids != 0, labels, views, sizes))
    slots, budget = (max(r[key].shape[1] for r in rows) for key in ("tokens", "images"))
    return [{key: pad(key, value, slots, budget) for key, value in r.items()} for r in rows]


def pad(key: str, value: np.ndarray, slots: int, budget: int) -> np.ndarray:
    """Row arrays to `slots` slots and `budget` views."""
    short = (budget if key == "images" else slots) - value.shape[1]
    width = [(0, 0), (0, short)] + [(0, 0)] * (value.ndim - 2)
    return np.pad(value, width, constant_values=-1 if key == "image_slots" else 0)


def original(z, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): z[name] for name in z.files if name.startswith(prefix)}


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_updates(path):
    z = np.load(path)
    info = json.loads(str(z["info_json"]))
    shared = json.loads((GOLDENS / "llava_model/config.json").read_text())
    model = golden_model.model_config(
        shared | {key: info[key] for key in ("llm_config", "mm", "vision_config") if key in info}
    )
    tower = golden_model.weights_of(np.load(GOLDENS / "llava_model/weights.npz"))
    tower = {name: value for name, value in tower.items() if "vision_tower" in name}
    params = golden_model.params_from(tower | golden_model.weights_of(z), model)

    trained = {golden_model.our_name(name, model)[0] for group in info["groups"] for name in group["params"]}
    stages = [stage for stage in (STAGE1, STAGE2) if select(stage, params) == trained]
    config = recipe(info, stages[0] if stages else tuple(f"^{re.escape(p)}$" for p in sorted(trained)))
    state = assemble(model, config, {name: jnp.asarray(value) for name, value in params.items()})
    assert set(state.trainable) == trained
    for group in info["groups"]:
        ours = {golden_model.our_name(name, model)[0] for name in group["params"]}
        assert {optimizer.group_lr(config, p) for p in ours} == {group["lr"]}
        assert {optimizer.group_decay(config, p) for p in ours} == {group["weight_decay"]}

    micros = micro_batches(model, z)
    step = make_step(model, config, {})
    for update, wanted in enumerate(info["steps"]):
        part = micros[update * config.accum : (update + 1) * config.accum]
        batch = split_micro_batches({key: np.concatenate([m[key] for m in part]) for key in part[0]}, config.accum)
        factor = optimizer.rate_factor(config, update, config.steps)
        assert [group["lr"] * factor for group in info["groups"]] == pytest.approx(wanted["lrs"], rel=1e-9, abs=1e-18)
        state, metrics = step(state, batch, np.float32(factor))
        np.testing.assert_allclose(metrics["micro_losses"], wanted["losses"], atol=1e-5)
        np.testing.assert_allclose(metrics["loss"], np.mean(wanted["losses"]), atol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], wanted["grad_norm_before_clip"], rtol=1e-3)
    compare(model, z, params, jax.device_get(state.trainable))


def compare(model, z, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    """Weights after the updates, and how far every tensor moved."""

    def ours(values, name):
        path, layer = golden_model.our_name(name, model)
        value = values[path] if path in values else before[path]
        return np.asarray(value) if layer is None else np.asarray(value)[layer]

    for name, value in original(z, "after:").items():
        path, _ = golden_model.our_name(name, model)
        np.testing.assert_allclose(ours(after, name), golden_model.our_value(path, value), atol=1e-5, err_msg=name)
    for name, norm in zip(z["delta_norm_names"], z["delta_norms"]):
        moved = np.linalg.norm(ours(after, str(name)) - ours(before, str(name)))
        np.testing.assert_allclose(moved, norm, rtol=1e-3, atol=1e-6, err_msg=str(name))
