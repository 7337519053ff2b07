"""Recipes compiled for chips that are not there: memory, collectives, the sentence where it does not fit, and the search."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from vlm_jax.config import ConfigError, LLMConfig, LoRAConfig, T5Config, VisionConfig, VLMConfig
from vlm_jax.data.options import DataConfig
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.planning.chips import CHIPS, topology
from vlm_jax.planning.costs import full_counts
from vlm_jax.planning.plan import mesh_of, out_of_memory
from vlm_jax.recipe import Recipe
from vlm_jax.train.options import LORA, TrainConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: extra tpu"
)

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
LAYERS = 8  # so many that a stack of kernels is larger than the embedding and the head
MODEL = VLMConfig(
    VisionConfig(image_size=56, patch_size=14, width=128, layers=LAYERS, heads=2, mlp=256),
    llm=LLMConfig(512, 256, 512, LAYERS, 4, 4, 128),
)
RECIPE = Recipe(
    model=MODEL,
    data=DataConfig(row_length=1024, sample_length=512, views_per_row=2),
    train=TrainConfig(global_batch=8, loss_chunk=256),
)


def plan_of(recipe: Recipe, name: str = "v5e:2x4", **options):
    """plan.plan, imported here because planning decides for the CPU."""
    from vlm_jax.planning.plan import plan

    return plan(recipe, topology(name), **options)


def with_mesh(recipe: Recipe, **sizes) -> Recipe:
    return dataclasses.replace(recipe, mesh=MeshConfig(**sizes))


@needs_libtpu
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=["fsdp", "fsdp-tensor"])
def test_the_step_compiles_for_a_slice(sizes):
    p = plan_of(with_mesh(RECIPE, **sizes))
    held = 4 * sum(np.prod(s) for s in shapes("^(llm|projector)/"))
    assert p.fits and held / 8 <= p.held["parameters"] <= held / 6  # small arrays are whole on every chip
    assert p.held["optimizer"] == pytest.approx(2 * p.held["parameters"], rel=0.01)
    kinds = p.by_kind()
    assert kinds["all-gather"][0] >= 2 * MODEL.llm.layers and {"all-reduce", "reduce-scatter"} & set(kinds)
    assert 0 < p.saved <= p.temporaries and 0 < p.mfu < 1
    # the loop over the layers gathers one layer at a time, and sums the gradients of one into parts, never whole
    stack = min(2 * np.prod(s) for s in shapes("^llm/blocks/.*/kernel"))
    gathered = [c.result for c in p.collectives if c.kind == "all-gather"]
    assert max(gathered) < stack, "parameters of all layers are gathered at once, outside the loop over them"
    if "tensor" not in sizes:  # whose activations are summed
        layer = min(4 * np.prod(s[1:]) for s in shapes("^llm/blocks/.*/kernel"))
        summed = [c.result for c in p.collectives if c.kind == "all-reduce" and c.inside]
        assert max(summed, default=0) < layer / 2, "gradients are summed whole on every chip"


def shapes(pattern: str):
    """Shapes of the model's parameters whose paths match."""
    import re

    from vlm_jax.models import vlm

    return [x.shape for path, x in vlm.shapes(MODEL).items() if re.search(pattern, path)]


@needs_libtpu
def test_splash_is_chosen_for_the_slice_and_not_for_this_machine():
    """Row length 1024 is long enough for the kernel; a program with it holds a TPU custom call."""
    from vlm_jax.parallel import rules
    from vlm_jax.parallel.mesh import make_mesh
    from vlm_jax.planning import programs
    from vlm_jax.planning.devices import devices

    with rules.use(make_mesh(MeshConfig(fsdp=4, tensor=2), devices(topology("v5e:2x4")))):
        text = programs.train_program(RECIPE, "tpu").lowered.as_text()
    assert "tpu_custom_call" in text


@needs_libtpu
def test_adapters_hold_less_than_full_training():
    lora = dataclasses.replace(MODEL, lora=(LoRAConfig(rank=8, alpha=16.0),))
    small = dataclasses.replace(RECIPE, model=lora, train=dataclasses.replace(RECIPE.train, trainable=LORA))
    full, adapters = plan_of(RECIPE), plan_of(small)
    assert adapters.held["optimizer"] < full.held["optimizer"] / 3 and adapters.needed < full.needed
    assert adapters.held["frozen"] > full.held["frozen"] and adapters.flops < full.flops


@needs_libtpu
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_generation(step):
    p = plan_of(with_mesh(RECIPE, fsdp=4, tensor=2), step=step, rows=8, slots=128, new=64)
    assert p.fits and p.held["parameters"] > 0
    if step == "decode":  # keys and values of all layers, bfloat16, over all eight chips
        assert p.held["cache"] == 2 * LAYERS * 8 * (128 + 64) * 4 * 128 * 2 / 8


T5 = VLMConfig(MODEL.vision, llm=T5Config(512, 256, 512, 2, 2, 4, 64), aspect="square")


@needs_libtpu
@pytest.mark.parametrize("step", [pytest.param(s, marks=pytest.mark.long) for s in ("train", "prefill")] + ["decode"])
def test_an_encoder_decoder(step):
    """Its cache holds keys and values of new tokens, and of the prompts for cross-attention; decoding reads neither encoder nor tower."""
    data = DataConfig(row_length=1024, sample_length=512, views_per_row=2, answer_length=256, template="t5_v1")
    made = dataclasses.replace(with_mesh(RECIPE, fsdp=4, tensor=2), model=T5, data=data)
    p = plan_of(made, step=step, rows=8, slots=128, new=64)
    assert p.fits and 0 < p.mfu < 1
    if step == "decode":
        assert p.held["cache"] == 2 * 2 * 8 * (128 + 64) * 4 * 64 * 2 / 8
        assert p.read - p.held["cache"] < 0.8 * p.held["parameters"]


@needs_libtpu
def test_what_does_not_fit_is_said_in_one_sentence(tmp_path):
    """The command as a user types it, with a model that eight small chips cannot hold."""
    done = subprocess.run(
        [sys.executable, "-m", "vlm_jax", "plan", "--config", "configs/llava15.py:7b,stage2", "--topology", "v5e:2x2",
         "--config.data.row_length=1024", "--config.data.views_per_row=1", "--config.train.global_batch=4", f"--out={tmp_path}/p.json"],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr[-2000:]
    assert "does not fit: a chip needs" in done.stdout and "has 15.75 GiB" in done.stdout
    (found,) = json.loads((tmp_path / "p.json").read_text())
    assert not found["fits"] and found["peak_bytes"] > 15.75 * 2**30


@needs_libtpu
def test_search_prints_the_fastest_that_fits(capsys):
    from vlm_jax.planning.command import plan as command
    from vlm_jax.recipe import config_dict

    two_heads = dataclasses.replace(MODEL, llm=LLMConfig(512, 128, 256, 1, 2, 2, 64))
    small = Recipe(two_heads, data=DataConfig(row_length=128, views_per_row=1), train=TrainConfig(global_batch=2))
    assert command(config_dict(small), "v5e:2x2", search=True) == 0
    said = capsys.readouterr().out
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| fsdp")]
    assert {row[2] for row in rows} == {"none", "linears", "full"} and any("tensor" in row[0] for row in rows)
    assert "The fastest that fits:" in said and "--config.train.accum=" in said


def test_meshes_and_micro_batches_that_are_tried():
    from vlm_jax.planning.command import accumulations, meshes

    slice_of_eight = topology("v5e:2x4")
    tried = list(meshes(RECIPE, slice_of_eight))  # four heads, eight rows
    assert [(m.fsdp, m.tensor) for m in tried] == [(8, 1), (4, 2), (2, 4)]
    assert [list(accumulations(RECIPE, slice_of_eight, m)) for m in tried] == [[1], [1, 2], [1, 2, 4]]
    assert [(m.data, m.fsdp, m.tensor) for m in meshes(RECIPE, topology("2xv5e:2x2"))] == [
        (2, 4, 1),
        (2, 2, 2),
        (2, 1, 4),
    ]


def test_topologies_and_meshes_that_do_not_exist():
    for name in ("v5e", "v9:2x2", "v5e:2x2x2", "v5p:4", "h100:1x2x3"):
        with pytest.raises(ConfigError, match="--topology"):
            topology(name)
    assert topology("v5p:2x2x4").count == 16 and str(topology("h100:2x8")) == "h100:2x8"
    assert mesh_of("fsdp=4,tensor=2", MeshConfig()) == MeshConfig(1, 4, 2, 1)
    assert mesh_of("tensor=2", MeshConfig()) == MeshConfig(1, -1, 2, 1) and mesh_of("", MeshConfig(2)) == MeshConfig(2)
    with pytest.raises(ConfigError, match="--mesh 'model=4'"):
        mesh_of("model=4", MeshConfig())


def test_slices_in_front_of_a_topology():
    two = topology("2xv5e:4x8")
    assert (two.slices, two.count, two.slice, str(two)) == (2, 64, "v5e:4x8", "2xv5e:4x8")
    assert topology("1xv5e:4x8") == topology("v5e:4x8")
    for name in ("0xv5e:4x8", "2xv4:2x2x2", "2xh100:8"):
        with pytest.raises(
            ConfigError, match=f"--topology '{name}': several slices, at least 1, are planned for v5e, v5p, v6e"
        ):
            topology(name)


@needs_libtpu
def test_two_slices_are_joined_by_sums_of_gradients_alone():
    """Each chip hands over its part of every gradient, in float32 or bfloat16; the head's once per chunk of the loss, here one."""
    short = DataConfig(row_length=128, views_per_row=1)
    train = dataclasses.replace(RECIPE.train, loss_chunk=8 * 128)
    p = plan_of(with_mesh(dataclasses.replace(RECIPE, data=short, train=train), data=2), "2xv5e:2x2")
    kinds = p.by_kind()
    across = {kind for kind in kinds if kind.endswith("between slices")}
    assert across == {"all-reduce between slices"} and "all-gather" in kinds
    assert p.held["parameters"] / 2 <= kinds["all-reduce between slices"][1] <= 1.1 * p.held["parameters"]
    sent = sum(c.sent for c in p.collectives if c.between)
    assert p.times["between slices"] == sent / CHIPS["v5e"].between > 0
    assert p.times["links"] == (sum(c.sent for c in p.collectives) - sent) / CHIPS["v5e"].links


@needs_libtpu
def test_slices_need_data_across_them():
    with pytest.raises(
        ConfigError, match="mesh data=1 must be a multiple of the 2 slices: set mesh.data, for example to 2"
    ):
        plan_of(RECIPE, "2xv5e:2x2")


def test_the_compilers_refusal_is_read():
    assert (
        out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 28.33G of 15.75G hbm.")
        == 28.33 * 2**30
    )
    other = "Ran out of memory on HBM, the total memory required for HLO temporaries (25.96G) exceeds available HBM (15.75G)."
    assert out_of_memory(f"RESOURCE_EXHAUSTED: {other}") == 25.96 * 2**30
    assert out_of_memory("INTERNAL: something else") is None


def test_full_rows_count_every_slot():
    counts = full_counts(RECIPE)
    assert counts == {"slots": 8 * 1024, "pairs": 8 * 1024 * 512 / 2, "views": 16}


def test_chips_agree_with_the_table_of_peaks():
    from vlm_jax.train.flops import peak_flops

    kinds = {
        "v4": "TPU v4",
        "v5e": "TPU v5 lite",
        "v5p": "TPU v5p",
        "v6e": "TPU v6 lite",
        "h100": "NVIDIA H100 80GB HBM3",
    }
    assert all(CHIPS[name].flops == peak_flops(kind) for name, kind in kinds.items())


def test_a_gpu_target_needs_its_compiler_and_no_gpu(monkeypatch):
    from vlm_jax.planning import devices

    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--topology h100:8 needs XLA's GPU compiler: pip install 'vlm_jax\[gpu\]'"):
        devices.devices(topology("h100:8"))
    with pytest.raises(ConfigError, match=r"--topology v5e:2x4 needs the TPU compiler: pip install 'vlm_jax\[tpu\]'"):
        devices.devices(topology("v5e:2x4"))


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, CUDA_PLUGINS)), reason="no CUDA plugin is installed: extra gpu"
)
def test_the_step_compiles_for_gpus_that_are_not_there():
    p = plan_of(with_mesh(RECIPE, fsdp=4, tensor=2), "h100:8")
    assert p.fits and {"all-gather", "all-reduce"} <= set(p.by_kind())


def test_kernels_that_ask_the_gpu_are_not_chosen_for_one_that_is_not_there():
    import jax.numpy as jnp

    from vlm_jax.nn.attention import Mask, choose

    short, long = (jnp.zeros((1, slots, 4, 64), jnp.bfloat16) for slots in (577, 1024))
    assert choose(long, long, Mask(), "gpu") == "cudnn"
    assert [choose(x, x, Mask(), "absent gpu") for x in (short, long)] == ["dense", "chunked"]
