"""Updates of the original trainer (torch AdamW, clipping, constant rate), stage 1 and stage 2, through our training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_t5
from tests.goldens import beside, cases
from tests.parity.test_clip_flant5_model import in_their_layout
from vlm_jax.train.options import STAGE1, STAGE2, TrainConfig
from vlm_jax.train.state import assemble
from vlm_jax.train.step import make_step, split_micro_batches

END = "_train_trajectory.npz"
STAGES = {"stage1": STAGE1, "stage2": STAGE2}
RUNS = [(path, stage) for path in cases(golden_t5.FOLDER, f"*{END}") for stage in STAGES]


@pytest.mark.parametrize("path, stage", RUNS, ids=lambda x: getattr(x, "stem", x))
def test_updates(path, stage):
    z, name = np.load(path), path.name.removesuffix(END)
    model, params = golden_t5.load(name)
    model = dataclasses.replace(model, llm=dataclasses.replace(model.llm, dropout=0.0))
    losses = z[f"{stage}/loss"]
    config = TrainConfig(
        trainable=STAGES[stage],
        steps=len(losses),
        lr=float(z[f"{stage}/lr"]),
        schedule="constant",
        warmup_steps=0,
        clip_norm=1.0,
        dtype="float32",
        vision_dtype="float32",
        frozen_dtype="float32",
        remat="full",
    )
    rows = golden_t5.row_batch(model, np.load(beside(path, f"{name}_mixed_batch.npz")))
    state = assemble(model, config, {key: jnp.asarray(value) for key, value in params.items()})
    step, batch = make_step(model, config, {}), split_micro_batches(rows, 1)
    for loss, norm in zip(losses, z[f"{stage}/grad_norm"]):
        state, metrics = step(state, batch, np.float32(1))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-3)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=5e-3)
    after = in_their_layout(model, jax.device_get(state.params))
    for key in (key for key in z.files if key.startswith(f"{stage}/final/")):
        np.testing.assert_allclose(after[key.split("/", 2)[2]], z[key], atol=1e-3, rtol=1e-3, err_msg=key)


def test_dropout_is_drawn_while_t5_is_frozen():
    """Stage 1 trains the projector alone, and T5 drops out all the same: two steps draw differently, the rate 0 draws nothing."""
    name, path = golden_t5.files_with("in/input_ids", "out/logits")[0]
    model, params = golden_t5.load(name)
    rows = golden_t5.row_batch(model, np.load(path))
    found = {}
    for rate in (0.0, 0.1):
        changed = dataclasses.replace(model, llm=dataclasses.replace(model.llm, dropout=rate))
        config = TrainConfig(trainable=STAGE1, steps=2, lr=0.0, dtype="float32", vision_dtype="float32", remat="none")
        state = assemble(changed, config, {key: jnp.asarray(value) for key, value in params.items()})
        step = make_step(changed, config, {})
        found[rate] = []
        for _ in range(2):
            state, metrics = step(state, split_micro_batches(rows, 1), np.float32(0))
            found[rate].append(float(metrics["loss"]))
    assert found[0.0][0] == found[0.0][1]
    assert len({*found[0.0], *found[0.1]}) == 3
