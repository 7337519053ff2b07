"""Visual tokenizers compiled for chips that are not there, and their FLOPs against those that XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.small_tokenizers import AUTOENCODER, recipe
from tests.test_plan import RECIPE, needs_libtpu
from vlm_jax.__main__ import main
from vlm_jax.config import ConfigError
from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.planning.chips import topology
from vlm_jax.planning.command import planned, tried
from vlm_jax.planning.products import products
from vlm_jax.planning.tokenizer_programs import abstract_task, lpips_shapes, pixels, tokenizer_flops
from vlm_jax.tokenizer_recipe import TokenizerInit
from vlm_jax.visual_tokenizers.layers import convolve

SIZE = 24  # attention over more positions would be computed in chunks, partly twice


def larger(kind: str, **adversary):
    """A small recipe of 24 pixels with a narrow VGG-16, so that edges of images weigh less."""
    made = recipe(kind, data=ImageDataConfig(size=SIZE), init=TokenizerInit(random=True))
    tokenizer = dataclasses.replace(made.tokenizer, autoencoder=dataclasses.replace(AUTOENCODER, resolution=SIZE))
    weights = dataclasses.replace(made.adversary, perceptual_weight=1.0, **adversary)
    return dataclasses.replace(made, tokenizer=tokenizer, adversary=weights)


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_convolutions_and_matrix_products_are_counted():
    images, kernel = array(2, 16, 16, 4), array(3, 3, 4, 8)
    same = lambda x, k: convolve(x, k, pad=1)
    assert products(same, images, kernel) == (2 * 2 * 16 * 16 * 8 * 9 * 4, 0)
    wide = array(1, 32, 32, 64), array(3, 3, 64, 64)
    assert products(same, *wide) == (2 * 32 * 32 * 64 * 9 * 64, 0), "all of them, of which a CPU saves half"
    halved = lambda x, k: convolve(x, k, stride=2, pad=((0, 1), (0, 1)))
    forward = 2 * 2 * 8 * 8 * 8 * 9 * 4
    assert products(halved, images, kernel) == (forward, 0)
    both = jax.grad(lambda x, k: jnp.sum(halved(x, k) ** 2), argnums=(0, 1))
    assert products(both, images, kernel).convolutions == pytest.approx(3 * forward, rel=0.05)  # edges
    loop = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    assert products(loop, array(6, 5), array(7, 5, 5)) == (0, 7 * 2 * 6 * 5 * 5)
    either = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ w)
    assert products(either, array(6, 5), array(5, 5)) == (0, 2 * 2 * 6 * 5 * 5)


@pytest.mark.parametrize(
    "kind", ["vq", pytest.param("hq", marks=pytest.mark.long), pytest.param("unicode", marks=pytest.mark.long)]
)
def test_flops_of_an_update_are_those_of_the_step_and_about_what_xla_counts(kind):
    made = larger(kind, adaptive=False)
    task, images = abstract_task(made), pixels(made, jnp.uint8)
    batch = {"images": jax.ShapeDtypeStruct((1, *images.shape), jnp.uint8)}
    given = {key: array() for key in ("rate", "ratio", "ratio_after")}
    step = task.step({"images": batch["images"].shape})
    useful, computed = tokenizer_flops(made)
    assert useful == computed
    assert products(step, task.abstract(), batch, given).total == pytest.approx(useful, rel=0.02)
    counted = step.lower(task.abstract(), batch, given).cost_analysis()["flops"]
    assert counted == pytest.approx(useful, rel=0.15)  # without the edges, with what is no product


def test_an_adaptive_critic_and_a_second_pass_cost_more():
    plain, adaptive = (tokenizer_flops(larger("vq", adaptive=x)) for x in (False, True))
    assert plain[0] < adaptive[0] < adaptive[1]
    twice = larger("vq", adaptive=False)
    compat = dataclasses.replace(twice.train.compat, two_pass=True)
    twice = dataclasses.replace(twice, train=dataclasses.replace(twice.train, compat=compat))
    assert tokenizer_flops(twice)[0] > plain[0]


def test_the_perceptual_network_has_its_real_size_unless_it_is_random():
    assert lpips_shapes(recipe("vq")) == {}
    made = larger("vq")
    narrow, real = lpips_shapes(made), lpips_shapes(dataclasses.replace(made, init=TokenizerInit()))
    assert narrow["conv_28/kernel"].shape == (3, 3, 32, 32) and real["conv_28/kernel"].shape == (3, 3, 512, 512)


@needs_libtpu
def test_the_update_of_both_networks_compiles_for_a_slice():
    from vlm_jax.planning.plan import plan

    p = plan(recipe("vq"), topology("v5e:2x4"))
    assert p.fits and p.held["optimizer"] == pytest.approx(2 * p.held["parameters"], rel=0.01)
    assert p.held["moving"] > 0 and 0 < p.saved and 0 < p.mfu < 1
    assert {"all-gather", "all-reduce"} <= set(p.by_kind())
    rings = [c.name for c in p.collectives if c.kind == "collective-permute" and c.inside]
    assert not rings, "a convolution with a kernel that is cut along its inputs becomes a loop over devices"


def test_a_step_that_does_not_fit_the_recipe_is_one_sentence():
    assert planned(recipe("vq"), "train") == planned(recipe("vq"), "tokenizer") == recipe("vq")
    with pytest.raises(ConfigError, match="--step tokenizer .* this config is of a vision-language model"):
        planned(RECIPE, "tokenizer")
    with pytest.raises(ConfigError, match="--step prefill .* this config is of a visual tokenizer"):
        planned(recipe("vq"), "prefill")
    with pytest.raises(ConfigError, match="--step"):
        planned(RECIPE, "sampling")


def test_the_command_line_refuses_a_wrong_pair(capsys):
    assert (
        main(["plan", "--config", "configs/llava15.py:7b,stage2", "--step", "tokenizer", "--topology", "v5e:2x4"]) == 2
    )
    assert main(["plan", "--config", "configs/prior.py:gpt_b,c2i", "--topology", "v5e:2x4"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and "visual tokenizer" in said[0] and "prior" in said[1]


def test_the_search_divides_a_batch_and_never_accumulates():
    found = [made.mesh for candidates in tried(recipe("vq"), topology("v5e:2x4")) for made in candidates]
    assert [(m.data, m.fsdp) for m in found] == [(1, 8), (8, 1)]
    found = [made.mesh for candidates in tried(recipe("vq"), topology("2xv5e:2x2")) for made in candidates]
    assert [(m.data, m.fsdp) for m in found] == [(2, 4), (8, 1)]
