"""Adapters in the model and in training: what they are, what trains, dropout, recomputation, and what is refused."""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small_runs import EXACT, MODEL, Batches, Weights, batch
from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, LoRAConfig, QuantConfig
from vlm_jax.models import vlm
from vlm_jax.models.adapters import linears
from vlm_jax.nn.dropout import dropout, dropout_key
from vlm_jax.nn.layers import Linear
from vlm_jax.nn.params import scan, split, stack
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.train import optimizer
from vlm_jax.train import state as states
from vlm_jax.train.checkpoint import Checkpointer
from vlm_jax.train.loop import train
from vlm_jax.train.options import LORA
from vlm_jax.train.step import loss_and_gradients, split_micro_batches

LLM_LORA = LoRAConfig(("^llm/blocks/",), rank=4, alpha=8.0)
TOWER_LORA = LoRAConfig(("^tower/blocks/",), rank=2, alpha=4.0, rslora=True)
QUANT = QuantConfig(block=16)  # the tests' model is 32 wide
ADAPTED = dataclasses.replace(MODEL, lora=(LLM_LORA, TOWER_LORA))
Q_ADAPTED = dataclasses.replace(ADAPTED, quant=QUANT)
LORA_RUN = dataclasses.replace(EXACT, trainable=(r"/lora_[ab]$", "^projector/"), group_lrs=((r"^projector/", 1e-3),))


# random bits take long to compile: where dropout is the matter, a few linears of tower and LLM are enough
FEW = dataclasses.replace(MODEL, lora=(LoRAConfig(("^(llm|tower)/blocks/(attn/q|mlp/down)$",), 4, 8.0, dropout=0.5),))


def one_device():
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def random_pair(linear, seed=0):
    """Give an adapted linear factors that are not zero."""
    rng = np.random.default_rng(seed)
    for name in ("lora_a", "lora_b"):
        leaf = getattr(linear, name)
        setattr(linear, name, nnx.Param(jnp.asarray(rng.normal(0, 0.2, leaf.get_value().shape), jnp.float32)))


def test_leaves_axes_and_start():
    shapes, axes, base = vlm.shapes(ADAPTED), vlm.axes(ADAPTED), vlm.shapes(MODEL)
    assert shapes["llm/blocks/attn/k/lora_a"].shape == (2, 32, 4) and axes["llm/blocks/attn/k/lora_a"][1:] == (
        "embed",
        None,
    )
    assert shapes["llm/blocks/attn/k/lora_b"].shape == (2, 4, 16) and axes["llm/blocks/attn/k/lora_b"][1:] == (
        "embed",
        "kv_heads",
    )
    assert shapes["tower/blocks/mlp/down/lora_scale"].shape == (1, 2)
    assert shapes.keys() - base.keys() == {p for p in shapes if "/lora_" in p} and base.keys() <= shapes.keys()
    assert len(shapes) - len(base) == 3 * (7 + 6)
    params = jax.device_get(states.initialiser(ADAPTED, EXACT, [p for p in shapes if "/lora_" in p])())
    assert not any(params[p].any() for p in params if p.endswith("lora_b"))
    a = params["llm/blocks/mlp/down/lora_a"]
    assert 0.9 / 8 < np.abs(a).max() <= 1 / 8 and not np.array_equal(a[0], a[1])  # +-1/sqrt(64 inputs)
    assert set(params["llm/blocks/mlp/down/lora_scale"].flat) == {2.0}
    assert set(params["tower/blocks/attn/q/lora_scale"].flat) == {np.float32(4 / np.sqrt(2))}


def test_the_first_group_that_matches_wins():
    groups = (LoRAConfig(("attn/q$",), 3), LoRAConfig(("^llm/blocks/", "^projector/layer_0$"), 5))
    shapes = vlm.shapes(dataclasses.replace(MODEL, lora=groups))
    ranks = {p.removesuffix("/lora_scale"): s.shape[-1] for p, s in shapes.items() if p.endswith("lora_scale")}
    assert ranks["llm/blocks/attn/q"] == ranks["tower/blocks/attn/q"] == 3
    assert ranks["llm/blocks/attn/v"] == ranks["projector/layer_0"] == 5 and "projector/layer_1" not in ranks


@pytest.mark.parametrize("quant", [None, QUANT, QuantConfig("int8")])
def test_a_merged_linear_equals_the_unmerged(quant):
    linear = Linear(32, 24, ("embed", "mlp"), nnx.Rngs(0), bias=True)
    linear.adapt(LoRAConfig(rank=4, alpha=8.0), jax.random.key(0), 1)
    random_pair(linear)
    if quant is not None:
        linear.store(quant, jax.random.key(1), 0.1)
    x = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    merged = x @ linear.weight() + linear.bias[...]
    np.testing.assert_allclose(linear(x), merged, atol=1e-5)
    a, b = linear.lora_a[...], linear.lora_b[...]
    bare = linear(x) - 2.0 * (x @ a) @ b
    linear.lora_a = None
    np.testing.assert_allclose(bare, linear(x), atol=1e-4)


def test_an_untrained_adapter_changes_nothing():
    rows = {key: jnp.asarray(x) for key, x in batch(0, rows=2).items()}
    params = dict(Weights(ADAPTED).arrays)
    params |= {path: np.zeros_like(x) for path, x in params.items() if path.endswith("lora_b")}
    with_it = jax.jit(lambda p: vlm.forward(vlm.build(ADAPTED, p), rows))(params)
    bare = {path: x for path, x in params.items() if "/lora_" not in path}
    np.testing.assert_array_equal(with_it, jax.jit(lambda p: vlm.forward(vlm.build(MODEL, p), rows))(bare))


@functools.cache
def finished_run(quant):
    """(state before, state after, model) of two updates."""
    model = Q_ADAPTED if quant else ADAPTED
    config = dataclasses.replace(LORA_RUN, frozen_dtype="bfloat16", steps=2, warmup_steps=0)
    with rules.use(one_device()):
        before = jax.device_get(states.create(model, config, Weights()).params)
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            config, model, lambda s, _: Batches(s), folder, mesh=one_device(), source=Weights(), progress=False
        )
    return before, result.state, model


@pytest.mark.parametrize("quant", [pytest.param(False, marks=pytest.mark.long), True])
def test_only_adapters_and_projector_move(quant):
    before, state, model = finished_run(quant)
    assert set(state.trainable) == {
        p for p in vlm.shapes(model) if p.startswith("projector/") or p.endswith(("lora_a", "lora_b"))
    }
    assert set(state.opt_state.mu) == set(state.trainable)
    for path, value in state.frozen.items():
        assert np.asarray(value).tobytes() == before[path].tobytes(), f"{path} is frozen"
    still = [path for path, value in state.trainable.items() if np.array_equal(value, before[path])]
    assert not still, "the gradient reaches every adapter of tower and LLM"
    kinds = {path.rpartition("/")[2]: str(value.dtype) for path, value in state.frozen.items()}
    assert kinds["lora_scale"] == "float32" and kinds["embedding"] == "bfloat16"
    if quant:
        assert "llm/blocks/attn/q/kernel" not in state.params
        wanted = {
            "kernel_codes": "uint8",
            "kernel_absmax": "uint8",
            "kernel_absmax_scale": "float32",
            "kernel_absmax_mean": "float32",
        }
        assert {name: kinds[name] for name in wanted} == wanted
    else:
        assert kinds["kernel"] == "bfloat16"


@pytest.mark.long
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """With dropout, on a quantised base, from a checkpoint that holds base, adapters and moments; no source is given again."""
    model = dataclasses.replace(FEW, quant=QUANT)
    config = dataclasses.replace(LORA_RUN, save_every=2, accum=2, schedule="constant", warmup_steps=0)
    run = functools.partial(train, model=model, batches=lambda s, _: Batches(s), mesh=one_device(), progress=False)
    whole = run(config, run=tmp_path / "a", source=Weights())
    run(dataclasses.replace(config, steps=4), run=tmp_path / "b", source=Weights(), available_steps=6)
    later = run(config, run=tmp_path / "b")
    assert later.step == 6
    for path, value in whole.state.params.items():
        np.testing.assert_allclose(later.state.params[path], value, atol=1e-6, err_msg=path)
    checkpoints = Checkpointer(tmp_path / "b" / "checkpoints")
    assert set(checkpoints.params()[0]) == set(vlm.shapes(model))
    checkpoints.close()


@functools.cache
def gradient_parts():
    model = FEW
    rng, params = np.random.default_rng(0), dict(Weights().arrays)
    for path, like in vlm.shapes(model).items():
        if "/lora_" in path:
            value = np.full(like.shape, 0.5) if path.endswith("scale") else 0.3 * rng.normal(size=like.shape)
            params[path] = value.astype(np.float32)
    chosen = states.select(LORA_RUN.trainable, params)
    return model, *({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))


@functools.cache
def compiled(remat, accum):
    model, _, _ = gradient_parts()
    return jax.jit(
        functools.partial(loss_and_gradients, model, dataclasses.replace(LORA_RUN, remat=remat, accum=accum))
    )


def gradients(key, remat="none", accum=1, rows=None):
    _, trainable, frozen = gradient_parts()
    rows = split_micro_batches(batch(0), accum) if rows is None else rows
    return jax.device_get(compiled(remat, accum)(trainable, frozen, rows, key))


@pytest.mark.parametrize("remat", [pytest.param("full", marks=pytest.mark.long), "linears", "attention"])
def test_dropout_is_exact_under_recomputation(remat):
    """Tower included: its blocks are recomputed too, with the masks they had."""
    key = jax.random.key(3)
    (wanted, sums), (found, again) = gradients(key), gradients(key, remat)
    assert abs(float(sums["loss"]) - float(again["loss"])) < 1e-5
    for path, gradient in wanted.items():
        np.testing.assert_allclose(found[path], gradient, atol=1e-5, err_msg=path)
    assert any(np.abs(g).max() > 1e-3 for p, g in wanted.items() if p.startswith("tower/"))


def test_dropout_changes_with_step_and_not_without_a_key():
    losses = [
        float(gradients(key)[1]["loss"])
        for key in (jax.random.key(0), jax.random.key(1), jax.random.key(0), None, None)
    ]
    assert losses[0] == losses[2] != losses[1] and losses[3] == losses[4] != losses[0]


def test_dropout_changes_with_micro_batch():
    rows = {key: np.concatenate([x, x]) for key, x in split_micro_batches(batch(0), 1).items()}
    for key, equal in ((jax.random.key(0), False), (None, True)):
        first, second = gradients(key, accum=2, rows=rows)[1]["micro_losses"]
        assert (abs(first - second) < 1e-6) == equal


def test_dropout_changes_with_layer_and_place():
    x = jnp.ones((8, 16))
    with dropout_key(jax.random.key(0)):
        assert not np.array_equal(dropout(x, 0.5, 1), dropout(x, 0.5, 2))
        np.testing.assert_array_equal(dropout(x, 0.5, 1), dropout(x, 0.5, 1))
        odd = np.asarray(dropout(jnp.ones((101, 999)), 0.3, 1))
        assert (
            abs((odd == 0).mean() - 0.3) < 0.01
            and abs(odd.mean() - 1) < 0.01
            and set(odd.flat) == {0, np.float32(1 / 0.7)}
        )
        assert abs(np.corrcoef((odd[:, :-1] == 0).flat, (odd[:, 1:] == 0).flat)[0, 1]) < 0.01
        blocks = stack(lambda r: Linear(2, 2, (None, None), r, bias=False), 3, nnx.Rngs(0))
        _, masks = scan(blocks, lambda block, c, _: (c, dropout(x, 0.5, 1)), 0.0)
    assert len({np.asarray(mask).tobytes() for mask in masks}) == 3
    assert dropout(x, 0.5, 1) is x


def test_a_quantised_kernel_is_kept_by_the_backward_pass_as_codes():
    """Without recomputation a scan would otherwise stack every dequantised kernel for the backward pass."""
    kernel = (2, 32, 64)  # llm/blocks/mlp/up
    for model, stacked in ((ADAPTED, False), (Q_ADAPTED, False)):
        shapes = vlm.shapes(model)
        chosen = states.select(LORA_RUN.trainable, shapes)
        trainable, frozen = ({p: s for p, s in shapes.items() if (p in chosen) == side} for side in (True, False))
        rows = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in split_micro_batches(batch(0, rows=2), 1).items()}
        text = str(jax.make_jaxpr(functools.partial(loss_and_gradients, model, LORA_RUN))(trainable, frozen, rows))
        assert (f"f32[{','.join(map(str, kernel))}]" in text) == (model is ADAPTED), stacked


def test_what_is_refused():
    with pytest.raises(ConfigError, match="model.lora.rank=0 must be at least 1"):
        LoRAConfig(rank=0)
    with pytest.raises(ConfigError, match="model.lora.dropout=1.0 must be at least 0 and below 1"):
        LoRAConfig(dropout=1.0)
    with pytest.raises(ConfigError, match="model.lora.targets is empty"):
        LoRAConfig(())
    with pytest.raises(ConfigError, match="model.lora.targets has .*, which is not a regular expression"):
        LoRAConfig(("(",))
    wrong = dataclasses.replace(MODEL, lora=(LoRAConfig(("q_proj",)),))
    with pytest.raises(
        ConfigError, match="'q_proj', which matches no linear: there are llm/blocks/attn/k, .*projector/layer_0"
    ):
        vlm.shapes(wrong)
    with pytest.raises(ConfigError, match="dropout=0.1 cannot be applied to llm/head"):
        vlm.shapes(dataclasses.replace(MODEL, lora=(LoRAConfig(("^llm/",), dropout=0.1),)))
    with pytest.raises(ConfigError, match="trains llm/blocks/attn/k, but model.quant stores its kernel in codes"):
        states.abstract(Q_ADAPTED, EXACT)


def test_an_adapter_on_the_head_trains():
    model = dataclasses.replace(MODEL, lora=(LoRAConfig(("^llm/head$",), rank=2, alpha=4.0),))
    config = dataclasses.replace(EXACT, trainable=LORA[:1])
    params = {
        **Weights().arrays,
        **jax.device_get(states.initialiser(model, config, [p for p in vlm.shapes(model) if "/lora_" in p])()),
    }
    chosen = states.select(config.trainable, params)
    trainable, frozen = ({k: v for k, v in params.items() if (k in chosen) == side} for side in (True, False))
    rows = split_micro_batches(batch(0, rows=2), 1)
    grads, _ = jax.jit(functools.partial(loss_and_gradients, model, config))(trainable, frozen, rows)
    assert np.abs(grads["llm/head/lora_b"]).max() > 0


@pytest.mark.parametrize("kind", ["none", "all", "lora_only"])
def test_biases_beside_adapters(kind):
    few = dataclasses.replace(MODEL, lora=(LoRAConfig(("^tower/blocks/attn/", "^llm/blocks/"), 2),))
    state = states.abstract(few, dataclasses.replace(LORA_RUN, lora_bias=kind))
    biases = {path for path in state.trainable if path.endswith("/bias") and not path.startswith("projector/")}
    attention = {f"tower/blocks/attn/{name}/bias" for name in "qkvo"}
    others = {
        f"tower/{name}/bias"
        for name in ("blocks/mlp/up", "blocks/mlp/down", "blocks/norm1", "blocks/norm2", "pre_norm")
    }
    assert biases == {"none": set(), "lora_only": attention, "all": attention | others}[kind]


def test_linears_are_found_by_path():
    model = nnx.eval_shape(lambda: vlm.VLM(MODEL, nnx.Rngs(0)))
    assert {"llm/head", "projector/layer_1", "tower/blocks/mlp/up", "llm/blocks/attn/o"} <= linears(model).keys()
    assert set(split(model)[1]) >= {f"{path}/kernel" for path in linears(model)}


@pytest.mark.parametrize("word, rank, frozen", [("lora", 319_815_680, "bfloat16"), ("qlora", 319_815_680, "uint8")])
def test_the_published_recipe(word, rank, frozen):
    """scripts/v1_5/finetune_lora.sh, and as many adapter parameters as peft counts for Vicuna 7B."""
    from configs import llava15

    recipe = recipes.from_config(llava15.get_config(f"7b,stage2,{word}"))
    group, t = recipe.model.lora[0], recipe.train
    assert (group.rank, group.alpha, group.dropout, group.rslora) == (128, 256.0, 0.05, False)
    state = states.abstract(recipe.model, t)
    assert sum(x.size for path, x in state.trainable.items() if "/lora_" in path) == rank
    assert {p for p in state.trainable if "/lora_" not in p} == {
        p for p in state.params if p.startswith("projector/") and "lora" not in p
    }
    assert (
        optimizer.group_lr(t, "llm/blocks/attn/q/lora_a") == 2e-4
        and optimizer.group_lr(t, "projector/layer_0/kernel") == 2e-5
    )
    name = "kernel" if word == "lora" else "kernel_codes"
    assert str(state.frozen[f"llm/blocks/attn/q/{name}"].dtype) == frozen
    small = recipes.from_config(llava15.get_config(f"7b,stage2,{word},smoke"))
    assert small.model.lora[0].rank == 4 and (small.model.quant is None) == (recipe.model.quant is None)
    states.abstract(small.model, small.train)
    with pytest.raises(ConfigError, match="exclude each other"):
        llava15.get_config(f"stage1,{word}")
