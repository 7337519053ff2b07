"""LlamaGen's prior by itself: cache, guidance, draws, dropout of conditions, meshes, checkpoints both ways, bad configs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.generate import sampling as per_row
from vlm_jax.nn import dropout
from vlm_jax.nn.params import merge
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.train.prior_loss import gpt_loss
from vlm_jax.visual_tokenizers.priors import gpt_names, models, sampling
from vlm_jax.visual_tokenizers.priors.gpt_sampling import sample, sampler
from vlm_jax.visual_tokenizers.priors.options import PUBLISHED, GPTConfig, Sampling

TINY = GPTConfig(
    layers=2, heads=4, kv_heads=2, width=32, mlp=48, codes=24, grid=4, classes=10, caption_slots=5, caption_width=12
)
CAPTION = dataclasses.replace(TINY, condition="caption", kv_heads=4)
KINDS = {"class": TINY, "caption": CAPTION}


@functools.cache
def params_of(config):
    """Random parameters with a head that is not zero, so that codes differ."""
    rng = np.random.RandomState(0)
    return {path: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32) for path, s in models.shapes(config).items()}


def model_of(config, params=None):
    return merge(models.structure(config), params_of(config) if params is None else params)


@functools.cache
def forward(config):
    """Jitted (params, codes, condition, mask, drop) -> logits of every code, without a cache."""

    def logits(params, codes, condition, mask, drop):
        model = model_of(config, params)
        return model.logits(model(codes, condition, mask, drop))

    return jax.jit(logits)


@functools.cache
def losses(config):
    """Jitted (params, batch, key) -> ((loss, sums), gradients)."""

    def loss(params, batch, key):
        sums = gpt_loss(model_of(config, params), batch, key)
        return sums.loss / sums.tokens, sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def inputs(config, rows=3, seed=0):
    """(condition, mask) of some rows; captions are padded on the left by 0, 1, 2, ... slots."""
    rng = np.random.RandomState(seed)
    if config.condition == "class":
        return jnp.asarray(rng.randint(0, config.classes, rows)), None
    features = rng.normal(size=(rows, config.caption_slots, config.caption_width))
    mask = np.arange(config.caption_slots) >= np.arange(rows)[:, None] % config.caption_slots
    return jnp.asarray(features * mask[..., None], jnp.float32), jnp.asarray(mask)


def codes_of(config, rows=3, seed=1):
    return jnp.asarray(np.random.RandomState(seed).randint(0, config.codes, (rows, config.length)), jnp.int32)


def keys_of(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def run(config, codes, condition, mask=None, drop=False):
    return forward(config)(params_of(config), codes, condition, mask, jnp.full(len(codes), drop))


@pytest.mark.parametrize("kind", KINDS)
def test_cache_gives_what_the_whole_pass_gives(kind):
    config = KINDS[kind]
    (condition, mask), codes = inputs(config), codes_of(config)

    @jax.jit
    def step_by_step(params):
        model = model_of(config, params)
        hidden, cache = model.start(condition, mask)

        def step(cache, code):
            hidden, cache = model.append(code, cache)
            return cache, hidden

        _, rest = jax.lax.scan(step, cache, codes[:, :-1].T)
        return model.logits(jnp.concatenate([hidden[None], rest]).swapaxes(0, 1))

    whole = run(config, codes, condition, mask)
    np.testing.assert_allclose(step_by_step(params_of(config)), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_and_what_pads_changes_nothing(kind):
    config = KINDS[kind]
    (condition, mask), codes = inputs(config), codes_of(config)
    logits, later = run(config, codes, condition, mask), run(config, codes.at[:, 7:].set(0), condition, mask)
    np.testing.assert_array_equal(logits[:, :8], later[:, :8])
    assert np.abs(logits[:, 8] - later[:, 8]).max() > 1e-3
    if mask is not None:
        noise = run(config, codes, jnp.where(mask[..., None], condition, 9.0), mask)
        np.testing.assert_allclose(noise, logits, atol=1e-5)
        assert np.abs(run(config, codes, condition, jnp.ones_like(mask)) - logits)[1:].max() > 1e-3


@pytest.mark.parametrize(("kind", "interval"), [("class", 3), ("caption", -1)])
def test_the_loop_draws_what_the_whole_pass_says(kind, interval):
    config = KINDS[kind]
    (condition, mask), keys = inputs(config), keys_of(3)
    how = Sampling(scale=2.5, interval=interval, temperature=0.9, top_k=9, top_p=0.95)
    codes = sampler(config, how)(params_of(config), condition, keys, mask)
    plain, without = (run(config, codes, condition, mask, drop) for drop in (False, True))
    guided = sampling.guide(plain, without, 2.5)
    assert np.abs(guided - plain).max() > 0.1
    first = config.length if interval < 0 else interval + 2
    logits = jnp.concatenate([guided[:, :first], plain[:, first:]], axis=1)
    draw = jax.jit(lambda logits, i: sampling.draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i), how))
    for i in range(config.length):
        np.testing.assert_array_equal(draw(logits[:, i], i), codes[:, i], err_msg=f"code {i}")
    assert len(np.unique(np.asarray(codes))) > 3


def test_an_image_does_not_depend_on_the_others():
    (condition, mask), keys = inputs(CAPTION), keys_of(3)
    draw = functools.partial(sampler(CAPTION, Sampling(top_k=12)), params_of(CAPTION))
    together = draw(condition, keys, mask)
    other = draw(condition[::-1], keys[::-1], mask[::-1])
    np.testing.assert_array_equal(together[1], other[1])
    np.testing.assert_array_equal(together, other[::-1])
    assert (together != draw(condition, keys_of(3, seed=5), mask)).any()


def test_ties_at_the_kth_place_are_kept():
    kept = sampling.warp(jnp.asarray([[0.0, 2.0, 1.0, 1.0, -1.0]]), Sampling(top_k=2))
    np.testing.assert_array_equal(np.isfinite(kept[0]), [False, True, True, True, False])
    greedy = sampling.draw(jnp.asarray([[0.0, 2.0, 2.0]]), keys_of(1), Sampling(temperature=0))
    np.testing.assert_array_equal(greedy, [1])


@pytest.mark.parametrize("how", [(0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 7, 0.6), (0.5, 99, 0.3), (1.0, 0, 1e-6)])
def test_filters_agree_with_those_of_text(how):
    logits = 3 * jax.random.normal(jax.random.key(0), (6, 31))
    settings = per_row.Settings(*(jnp.full(6, x) for x in (*how, 1.0)))
    np.testing.assert_allclose(
        sampling.warp(logits, Sampling(1.0, -1, *how)), per_row.warp(logits, settings), rtol=1e-6
    )


def test_conditions_are_dropped_and_the_rest_is_the_loss_of_no_condition():
    always = dataclasses.replace(TINY, condition_dropout=0.999, token_dropout=0, residual_dropout=0, mlp_dropout=0)
    (labels, _), codes = inputs(TINY), codes_of(TINY)
    model = merge(models.structure(always), params_of(TINY))
    loss = jax.jit(lambda labels, key: gpt_loss(model, {"codes": codes, "labels": labels}, key).loss)
    dropped, kept, nothing = (
        loss(labels, jax.random.key(0)),
        loss(labels, None),
        loss(jnp.full(3, TINY.classes), jax.random.key(0)),
    )
    np.testing.assert_allclose(dropped, nothing, rtol=1e-6)
    assert abs(float(dropped - kept)) > 1e-3


def caption_batch(rows):
    condition, mask = inputs(CAPTION, rows)
    return {"codes": codes_of(CAPTION, rows), "captions": condition, "caption_mask": mask}


def test_gradients_and_dropout_of_a_step():
    params, batch = params_of(CAPTION), caption_batch(8)
    (loss, _), grads = losses(CAPTION)(params, batch, jax.random.key(1))
    assert not grads["condition/unconditional"].any(), "the features of no caption are not trained"
    assert all(np.abs(g).max() > 0 for path, g in grads.items() if path != "condition/unconditional")
    again, other = (losses(CAPTION)(params, batch, jax.random.key(seed))[0][0] for seed in (1, 2))
    assert loss == again != other


def test_rows_skip_blocks_more_often_further_up():
    x = jnp.ones((4000, 2))
    assert (dropout.drop_rows(x, 0.5, 3) == x).all(), "without a key nothing is dropped"
    with dropout.dropout_key(jax.random.key(0)):
        some, none = dropout.drop_rows(x, jnp.float32(0.25), 3), dropout.drop_rows(x, 0.0, 3)
    assert (some[:, 0] == some[:, 1]).all() and (none == x).all()
    np.testing.assert_allclose([(some[:, 0] == 0).mean(), some.max(), some.mean()], [0.25, 4 / 3, 1], atol=0.03)
    config = dataclasses.replace(TINY, drop_path=0.5, token_dropout=0, residual_dropout=0, mlp_dropout=0)
    codes, labels = codes_of(TINY, 64), inputs(TINY, 64)[0]

    @jax.jit
    def hidden(params, key):
        with dropout.dropout_key(key):
            return model_of(config, params)(codes, labels)

    # the last of two blocks skips half of its halves: a row in four is what the first block made of it
    one = {path: x.at[1:].set(0) if path.startswith("blocks/") else x for path, x in params_of(TINY).items()}
    skipped, first = hidden(params_of(TINY), jax.random.key(0)), hidden(one, None)
    share = np.isclose(skipped, first, atol=1e-4).all(axis=(1, 2)).mean()
    assert 0.08 < share < 0.45


def test_loss_and_codes_do_not_depend_on_the_mesh():
    params, batch, keys = params_of(CAPTION), caption_batch(8), keys_of(8)
    how = Sampling(scale=2.0, top_k=10)
    (wanted, _), grads = losses(CAPTION)(params, batch, jax.random.key(1))
    codes = sampler(CAPTION, how)(params, batch["captions"], keys, batch["caption_mask"])
    with rules.use(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        where = models.shardings(CAPTION)
        assert not where["blocks/mlp/up/kernel"].is_fully_replicated
        params = {path: jax.device_put(x, where[path]) for path, x in params.items()}
        losses.cache_clear()
        (ours, _), ours_grads = losses(CAPTION)(params, batch, jax.random.key(1))
        losses.cache_clear()
        drawn = sampler(CAPTION, how)(params, batch["captions"], keys, batch["caption_mask"])
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    for path, grad in grads.items():
        np.testing.assert_allclose(ours_grads[path], grad, atol=1e-5, err_msg=path)
    np.testing.assert_array_equal(drawn, codes)


def test_a_new_prior_knows_nothing():
    params = models.init(TINY, 0)
    assert {path: x.shape for path, x in params.items()} == {path: x.shape for path, x in params_of(TINY).items()}
    assert not params["head/kernel"].any() and params["embed/embedding"].std() == pytest.approx(0.02, rel=0.1)
    assert params["blocks/attn/q/kernel"].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_leave_as_they_came(kind):
    config, params = KINDS[kind], params_of(KINDS[kind])
    tensors = gpt_names.write(config, params)
    assert {e.key: e.shape for e in gpt_names.entries(config)} == {k: v.shape for k, v in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, gpt_names.read(config, tensors), dict(params))
    found = gpt_names.config_of({k: v.shape for k, v in tensors.items()}, grid=4, heads=4)
    assert models.shapes(found) == models.shapes(config)
    missing = {k: v for k, v in tensors.items() if k != "layers.1.attention.wqkv.weight"}
    with pytest.raises(ConfigError, match="no tensor layers.1.attention.wqkv.weight"):
        gpt_names.read(config, missing)
    with pytest.raises(ConfigError, match="none of the published sizes"):
        gpt_names.config_of({k: v.shape for k, v in tensors.items()}, grid=4)
    with pytest.raises(ConfigError, match="no prior of LlamaGen"):
        gpt_names.config_of({}, grid=4)


def test_published_sizes():
    """Parameters as the paper's tables round them (in millions)."""
    counts = {name: sum(np.prod(s.shape) for s in models.shapes(c).values()) / 1e6 for name, c in PUBLISHED.items()}
    wanted = {"gpt_b": 111, "gpt_l": 343, "gpt_xl": 775, "gpt_xxl": 1411, "gpt_xxxl": 3900, "gpt_3b": 3097}
    for name, millions in wanted.items():
        assert abs(counts[name] / millions - 1) < 0.01, f"{name} has {counts[name]:.0f} million parameters"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"condition": "label"}, "prior.condition='label'"),
        ({"width": 40}, "multiple of 4 x prior.heads"),
        ({"kv_heads": 3}, "multiple of prior.kv_heads"),
        ({"grid": 0}, "prior.grid=0"),
        ({"mlp_dropout": 1.0}, "prior.mlp_dropout=1.0"),
    ],
)
def test_configs_that_cannot_be_run(wrong, says):
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(TINY, **wrong)


@pytest.mark.parametrize("wrong", [{"scale": 0.5}, {"interval": -2}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0}])
def test_draws_that_cannot_be_made(wrong):
    with pytest.raises(ConfigError, match="cannot be used"):
        Sampling(**wrong)


def test_a_prior_without_dropped_conditions_cannot_be_guided():
    config = dataclasses.replace(TINY, condition_dropout=0)
    assert models.shapes(config)["condition/table/embedding"].shape == (10, 32)
    with pytest.raises(ConfigError, match="cannot be guided"):
        sample(models.abstract(config), jnp.zeros(1, int), keys_of(1), how=Sampling(scale=2.0))
