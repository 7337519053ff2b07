"""Checkpoints that cannot be written or are of another model: one sentence, and older ones stay."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.small_runs import EXACT, LLM, MODEL, Batches, Weights
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.train import state as states
from vlm_jax.train.checkpoint import Checkpointer, CheckpointError
from vlm_jax.train.loop import TrainingError, train
from vlm_jax.train.metrics import read_metrics
from vlm_jax.train.options import STAGE1

SMALL = dataclasses.replace(EXACT, trainable=STAGE1, frozen_dtype="bfloat16")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of checkpoints, state that was saved on a 4 x 2 mesh)."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with rules.use(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        state = states.create(MODEL, SMALL, Weights())
        checkpoints = Checkpointer(folder)
        checkpoints.save(3, state, {"row": 17}, {"train": {"lr": 1e-3}})
        checkpoints.close()
    return folder, jax.device_get(state)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=1, tensor=4), None], ids=str)
def test_restore_on_another_mesh_is_bit_equal(saved, mesh):
    folder, before = saved
    if mesh is None:
        after, meta = Checkpointer(folder).restore(states.abstract(MODEL, SMALL))
    else:
        with rules.use(make_mesh(mesh)):
            goal = states.abstract(MODEL, SMALL)
            after, meta = Checkpointer(folder).restore(goal)
            for x, s in zip(jax.tree.leaves(after), jax.tree.leaves(goal)):
                assert x.sharding.is_equivalent_to(s.sharding, x.ndim) and x.dtype == s.dtype
    assert meta["data"] == {"row": 17} and meta["step"] == 3 == int(after.step)
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(before, step=3), jax.device_get(after))


def test_all_parameters_without_optimizer(saved):
    folder, before = saved
    params, meta = Checkpointer(folder).params()
    assert params.keys() == before.params.keys() and meta["config"] == {"train": {"lr": 1e-3}}
    jax.tree.map(np.testing.assert_array_equal, before.params, params)
    assert {len(x.sharding.device_set) for x in params.values()} == {1}


OTHERS = [
    (
        dataclasses.replace(MODEL, llm=dataclasses.replace(LLM, mlp=96)),
        SMALL,
        "parameter llm/blocks/mlp/down/kernel is bfloat16[2, 64, 32], this config's is bfloat16[2, 96, 32]",
    ),
    (
        dataclasses.replace(MODEL, llm=dataclasses.replace(LLM, tie=True)),
        SMALL,
        "frozen parameter llm/head/kernel is bfloat16[32, 64], this config's is absent",
    ),
    (
        MODEL,
        EXACT,
        "trainable parameter llm/blocks/attn/k/kernel is absent, this config's is float32[2, 32, 16]",
    ),
]


@pytest.mark.parametrize("model, config, words", OTHERS)
def test_a_checkpoint_of_another_model(saved, model, config, words):
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        Checkpointer(saved[0]).restore(states.abstract(model, config))
    assert str(saved[0]) in str(caught.value) and "\n" not in str(caught.value)


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: check the path of the run"):
        Checkpointer(tmp_path / "nothing").params()


def run_script(folder, *arguments):
    script = Path(__file__).with_name("run_training.py")
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, str(script), str(folder), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_disk_full_while_saving(tmp_path):
    """A limit on the size of files stands in for the full disk: the second checkpoint is not written."""
    assert "ended: finished at 3" in run_script(tmp_path, "3").stdout
    full = run_script(tmp_path, "9", "3000")
    assert full.returncode != 0
    sentence = [line for line in full.stderr.splitlines() if "could not be written to" in line][-1]
    assert "the checkpoint of step 3 is intact: make room and start the same command again" in sentence
    again = run_script(tmp_path, "9")
    assert "the checkpoint of step 3 is read" in again.stderr and "ended: finished at 9" in again.stdout
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 10))


class Poisoned(Batches):
    """The fourth batch has a pixel value that no camera delivers."""

    def __next__(self):
        step, rows = super().__next__()
        images = rows["images"].astype(np.float32)
        return step, rows | {"images": np.full_like(images, np.nan) if step == 3 else images}


def test_loss_that_is_not_finite(tmp_path):
    config = dataclasses.replace(SMALL, global_batch=2, steps=8, log_every=8, save_every=2)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with pytest.raises(TrainingError) as caught:
        train(
            config,
            MODEL,
            lambda start, state: Poisoned(start, rows=2),
            tmp_path,
            mesh=mesh,
            source=Weights(),
            progress=False,
        )
    assert "step 4, whose batch holds samples [6, 7], has loss nan" in str(caught.value)
    assert "the checkpoint of step 2 is intact" in str(caught.value)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 8


def test_data_that_ends_too_early(tmp_path):
    config = dataclasses.replace(SMALL, global_batch=2, steps=8)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    three = list(zip(range(3), (rows for _, rows in Batches(0, rows=2))))
    with pytest.raises(
        TrainingError, match="the data ended after step 3 of 8: raise train.epochs or lower train.steps"
    ):
        train(
            config,
            MODEL,
            lambda start, state: iter(three),
            tmp_path,
            mesh=mesh,
            source=Weights(),
            progress=False,
        )
