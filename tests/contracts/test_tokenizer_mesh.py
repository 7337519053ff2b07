"""A tokenizer and its critic on any mesh: equal losses, gradients, codebooks and batch statistics; one compile."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.contracts.test_one_compile import compilations
from tests.small_tokenizers import TRAIN, batch, task
from vlm_jax.parallel import hosts, rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.train.loop import run_task
from vlm_jax.train.metrics import read_metrics
from vlm_jax.train.step import batch_shardings, split_micro_batches
from vlm_jax.train.tokenizer_step import IMAGE_AXES

MESHES = {"fsdp8": MeshConfig(fsdp=8), "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2)}
# a large eps: with Adam's usual one the direction of a gradient of 0 is that of its rounding errors
SMOOTH = dataclasses.replace(TRAIN, eps=1e-2, steps=2)


@pytest.fixture(autouse=True)
def quick_compiler():
    """These programs are compiled several times and run twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run_on(mesh, kind):
    """(results of the second update, the state after it, its shardings) of the same images on `mesh`."""
    of_run = task(kind, train=SMOOTH)
    with rules.use(mesh):
        state = of_run.create()
        rows = [split_micro_batches(batch(seed), 1, IMAGE_AXES) for seed in (0, 1)]
        shapes = {key: x.shape for key, x in rows[0].items()}
        step = of_run.step(shapes)
        for number, one in enumerate(rows):
            given = jax.tree.map(np.float32, of_run.given(number, 2))
            state, results = step(state, hosts.to_devices(one, batch_shardings(shapes, IMAGE_AXES)), given)
        return jax.device_get(results), state, of_run.abstract()


@functools.cache
def one_device(kind):
    results, state, _ = run_on(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), kind)
    return results, jax.device_get(state)


def compare(have, want, part):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-5, rtol=1e-5, err_msg=f"{part} {path}")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("rq", "data2_fsdp2_tensor2"),
        pytest.param("rq", "fsdp8", marks=pytest.mark.long),
        pytest.param("vq", "fsdp8", marks=pytest.mark.long),
    ],
)
def test_updates_do_not_depend_on_the_mesh(kind, name):
    results, state, goal = run_on(make_mesh(MESHES[name]), kind)
    wanted, before = one_device(kind)
    compare(results, wanted, "result")
    for part in ("trainable", "moving", "opt_state"):
        compare(getattr(state, part), getattr(before, part), part)
    assert any(path.startswith("statistics/") for path in state.moving), "batch norms see the images of all devices"
    jax.tree.map(lambda x, like: np.testing.assert_(x.sharding.is_equivalent_to(like.sharding, x.ndim)), state, goal)
    kernel = state.opt_state["generator"].mu["tokenizer/encoder/mid/block_1/conv1/kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // MESHES[name].fsdp


def test_a_run_compiles_its_step_once(tmp_path):
    of_run = task("hq3", train=dataclasses.replace(TRAIN, steps=10, log_every=3, save_every=100))
    asked = []  # compilations so far, each time a batch is read

    def watched(start, state):
        for step in range(10):
            asked.append(len(found))
            yield step, batch(step)

    with compilations() as found:
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        result = run_task(of_run, watched, tmp_path, mesh=mesh, progress=False)
    assert result.status == "finished"
    assert 0 < asked[5] == asked[-1]
    lines = read_metrics(tmp_path)
    assert [line["critic_loss"] > 0 for line in lines[:3]] == [False, True, True], "the critic begins at step 2"
    assert all(0 < line[f"level_{level}/codes_used"] <= 1 for line in lines for level in range(3))
    assert "window/level_0/perplexity" in lines[2] and "window/level_0/perplexity" not in lines[1]
    assert lines[-1]["loss"] < lines[0]["loss"]
