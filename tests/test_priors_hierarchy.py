"""RQ- and HQ-Transformers by themselves: cache, draws, meshes, dropout, losses, published sizes, sentences for what cannot be."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tiny_hierarchies import HQ, KINDS, RQ, codes_of, condition_of, forward, is_rq, params_of, table_of
from vlm_jax.config import ConfigError
from vlm_jax.nn.dropout import dropout_key
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig
from vlm_jax.visual_tokenizers.bottlenecks import bottleneck
from vlm_jax.visual_tokenizers.options import QuantizerConfig
from vlm_jax.visual_tokenizers.priors import models
from vlm_jax.visual_tokenizers.priors.hierarchy_loss import cross_entropy, hq_losses, rq_losses
from vlm_jax.visual_tokenizers.priors.hierarchy_options import PUBLISHED_HQ, PUBLISHED_RQ, StackConfig
from vlm_jax.visual_tokenizers.priors.hierarchy_sampling import sampler
from vlm_jax.visual_tokenizers.priors.hq_transformer import to_local, to_map, visible
from vlm_jax.visual_tokenizers.priors.options import Sampling
from vlm_jax.visual_tokenizers.priors.sampling import draw
from vlm_jax.visual_tokenizers.priors.soft_labels import soft_labels

HOW = (Sampling(temperature=0.9, top_k=7), Sampling(temperature=1.2, top_p=0.9), Sampling(temperature=0.0))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs here run once and are tiny: most of the time would go into optimising them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def keys_of(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def drawn(config, keys, condition):
    return sampler(config, HOW[: config.draws])(params_of(config), keys, condition, table_of(config))


def slots(config, arrays):
    """Codes or logits as [[B, positions, codes of the level at a position, ...] of every level]."""
    if is_rq(config):
        flat = arrays.reshape(len(arrays), config.positions, config.depth, *arrays.shape[4:])
        return [flat[:, :, d : d + 1] for d in range(config.depth)]
    return [to_local(x, config.grid) for x in arrays]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_with_caches_draws_what_the_whole_pass_says(kind):
    config, keys = KINDS[kind], keys_of(3)
    condition = condition_of(config)
    codes = drawn(config, keys, condition)

    @jax.jit
    def redrawn(params):
        levels, found = slots(config, forward(config, params, codes, condition).image), []
        ends = np.cumsum([0] + [z.shape[2] for z in levels])
        for level, z in enumerate(levels):
            B, T, n, V = z.shape
            numbers = (np.arange(T)[:, None] * ends[-1] + np.arange(ends[level], ends[level + 1])).reshape(-1)
            each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, numbers).reshape(-1)
            found.append(draw(z.reshape(-1, V), each, HOW[level]).reshape(B, T, n))
        return found

    assert len(np.unique(np.concatenate([np.ravel(x) for x in jax.tree.leaves(codes)]))) > 3
    again = redrawn(params_of(config))
    for level, (one, other) in enumerate(zip(slots(config, codes), again, strict=True)):
        np.testing.assert_array_equal(one, other, err_msg=f"level {level}")


@pytest.mark.parametrize("kind", ["rq", "hq_bidirectional"])
def test_guidance_draws_what_both_whole_passes_say(kind):
    """Greedy codes of guided logits; behind the first two positions (interval 0) those of the condition alone."""
    config, keys = dataclasses.replace(KINDS[kind], condition_dropout=0.1), keys_of(3)
    params, condition, scale = params_of(config), condition_of(config).reshape(-1), 3.0
    how = Sampling(temperature=0.0, scale=scale, interval=0)
    codes = sampler(config, how)(params, keys, condition, table_of(config))

    @jax.jit
    def both(params):
        nothing = jnp.full(3, config.numbers)
        return [slots(config, forward(config, params, codes, c).image) for c in (condition, nothing)]

    changed = False
    for (given, nothing), found in zip(zip(*both(params)), slots(config, codes), strict=True):
        guided = nothing[:, :2] + scale * (given[:, :2] - nothing[:, :2])
        np.testing.assert_array_equal(found[:, :2], guided.argmax(-1))
        np.testing.assert_array_equal(found[:, 2:], given[:, 2:].argmax(-1))
        changed |= bool((guided.argmax(-1) != given[:, :2].argmax(-1)).any())
    assert changed
    with pytest.raises(ConfigError, match="guidance leads away from no condition"):
        sampler(config, how)(params, keys, None, table_of(config))


def test_an_image_depends_on_its_own_key_and_condition_only():
    config, keys = KINDS["hq_text"], keys_of(3)
    condition = condition_of(config)
    together, turned = drawn(config, keys, condition), drawn(config, keys[::-1], condition[::-1])
    for one, other in zip(together, turned):
        np.testing.assert_array_equal(one, other[::-1])
    for others in (keys_of(3, 5), condition), (keys, (condition + 1) % config.text_codes):
        assert any((one != other).any() for one, other in zip(together, drawn(config, *others)))


def loss_of(config, params, codes, condition, key=None):
    with dropout_key(key):
        logits = forward(config, params, codes, condition)
    return (rq_losses if is_rq(config) else hq_losses)(config, logits, codes, condition)["loss"]


def spread(x):
    """Rows over the batch axes of the mesh in use."""
    return jax.device_put(x, rules.sharding(("batch",) + (None,) * (x.ndim - 1), x.shape, *rules.current()))


def on_mesh():
    return rules.use(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8]))


def test_a_mesh_changes_neither_loss_nor_gradients():
    config = KINDS["hq_text"]
    params, rows = params_of(config), (codes_of(config, 4), condition_of(config, 4))
    loss, wanted = jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))(params, *rows)
    unread = {path for path, gradient in wanted.items() if not np.any(gradient)}
    assert unread == {"head_tokens_1/embedding"}  # that of the finest level: its codes are drawn last
    with on_mesh():
        where = models.shardings(config)
        placed = {path: jax.device_put(x, where[path]) for path, x in params.items()}
        step = jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))
        found, grads = step(placed, *jax.tree.map(spread, rows))
    assert not placed["body/blocks/mlp/up/kernel"].sharding.is_fully_replicated
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for path, gradient in grads.items():
        np.testing.assert_allclose(gradient, wanted[path], atol=2e-5, err_msg=path)


def test_a_mesh_changes_no_codes():
    config, keys = KINDS["rq_apart"], keys_of(4)
    condition = condition_of(config, 4)
    alone = drawn(config, keys, condition)
    with on_mesh():
        where = models.shardings(config)
        placed = {path: jax.device_put(x, where[path]) for path, x in params_of(config).items()}
        draw_them = sampler(config, HOW[: config.draws])
        together = draw_them(placed, spread(keys), spread(condition), table_of(config))
    np.testing.assert_array_equal(together, alone)


def test_a_new_model_knows_nothing_and_dropout_is_another_with_every_key():
    config = dataclasses.replace(KINDS["rq"], dropout=0.2)
    loss = jax.jit(functools.partial(loss_of, config, models.init(config, 0), codes_of(config), condition_of(config)))
    first, again, other = (float(loss(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again != other
    assert abs(first - math.log(config.codes)) < 0.05


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_keeps_its_types_in_bfloat16(kind):
    config = KINDS[kind]
    run, condition, table = sampler(config, dtype="bfloat16"), condition_of(config), table_of(config)
    codes = jax.eval_shape(lambda p, k: run(p, k, condition, table), params_of(config), keys_of(3))
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), codes_of(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), codes) == wanted


def test_soft_labels_that_are_sure_are_codes():
    logits = np.random.RandomState(0).normal(size=(4, 5, 11)).astype(np.float32)
    codes = np.arange(20).reshape(4, 5) % 11
    loss = jax.jit(cross_entropy)
    hard, soft = loss(logits, codes), loss(logits, np.eye(11, dtype=np.float32)[codes])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(hard, -np.log(np.take_along_axis(p, codes[..., None], -1)[..., 0]), atol=1e-5)
    np.testing.assert_allclose(soft, hard, atol=1e-5)


@pytest.mark.parametrize("kind", ["rq", "levels"])
def test_soft_labels_are_highest_at_the_codes(kind):
    quantizer = QuantizerConfig(kind=kind, codes=(12, 10, 8) if kind == "levels" else (12,), width=4, depth=2)
    module = bottleneck(quantizer, nnx.Rngs(0))
    books, z = module.initial(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 4, 4, 4))

    @jax.jit
    def run(z):
        drawn = soft_labels(module, z, books, 0.5, jax.random.key(2)) if kind == "rq" else None
        return module.encode(z, books).codes, soft_labels(module, z, books, 0.5), drawn

    wanted, (codes, labels), drawn = run(z)
    for one, other, soft in zip(wanted, codes, labels, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(soft.argmax(-1), one)
        np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-5)
    assert drawn is None or ((drawn[0][0] != codes[0]).any() and (drawn[1][0][..., 0, :] == labels[0][..., 0, :]).all())


@pytest.mark.parametrize(
    ("quantizer", "says"),
    [
        (QuantizerConfig(codes=(12,), width=4), "for tokenizers with quantizer.kind rq, two_level or levels"),
        (
            QuantizerConfig(kind="rq", codes=(12,), width=4, language=True, shared=True),
            "a codebook of the tokenizer's own",
        ),
    ],
)
def test_tokenizers_without_soft_labels(quantizer, says):
    with pytest.raises(ConfigError) as error:
        soft_labels(bottleneck(quantizer, nnx.Rngs(0)), jnp.zeros((1, 2, 2, 4)), {}, 1.0)
    assert says in str(error.value)


def test_local_codes_are_those_below_a_top_code():
    x = jnp.arange(2 * 8 * 8).reshape(2, 8, 8)
    local = to_local(x, 4)
    np.testing.assert_array_equal(local[1, 6], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(to_map(local, 4), x)
    np.testing.assert_array_equal(visible(KINDS["hq_three"]).sum(1), [1] + [5] * 4 + [21] * 16)


@pytest.mark.parametrize("name", PUBLISHED_RQ)
def test_published_sizes(name):
    count = sum(math.prod(s.shape) for s in models.shapes(PUBLISHED_RQ[name]).values())
    assert abs(count / (int(name.split("_")[1].removesuffix("m")) * 1e6) - 1) < 0.02


@pytest.mark.parametrize("name", PUBLISHED_HQ)
def test_published_hq_models_can_be_made(name):
    config = PUBLISHED_HQ[name]
    made = models.shapes(config)
    assert made["body/blocks/mlp/up/kernel"].shape == (config.body.layers, config.body.width, 4 * config.body.width)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StackConfig(1, 16, 3), "prior.width=16 must be a multiple of prior.heads=3"),
        (lambda: StackConfig(1, 16, 2, act="relu"), "prior.act='relu' is unknown"),
        (lambda: StackConfig(1, 16, 2, dropout=1.0), "prior.dropout=1.0 must be at least 0 and below 1"),
        (lambda: RQ(head=StackConfig(1, 32, 2)), "prior.head.width=32 must be prior.body.width=16"),
        (lambda: RQ(head=StackConfig(0, 16, 2)), "prior.head.layers=0 must be at least 1"),
        (lambda: RQ(depth=0), "prior.depth=0 must be at least 1"),
        (lambda: RQ(conditions=1, condition_tokens=4), "prior.condition_tokens > 1 needs prior.conditions"),
        (
            lambda: HQ(condition="none", condition_dropout=0.1),
            "takes classes away, but this prior has none (condition none)",
        ),
        (lambda: HQ(grid=3), "prior.positions=4 must be at least prior.grid^2=9"),
        (lambda: HQ(codes=(9,)), "prior.codes=(9,) needs two or three positive numbers"),
        (lambda: HQ(codes=(9, 9, 9)), "prior.weights=(1.0, 4.0) needs one number per level"),
        (lambda: HQ(codes=(9, 9, 9), weights=(1, 4, 16), order="top2bot"), "three levels of prior.codes need"),
        (lambda: HQ(order="any"), "prior.order='any' is unknown"),
        (lambda: HQ(positions=5, axes=True), "prior.positions=5 must be a square"),
    ],
)
def test_configs_that_cannot_be(make, says):
    with pytest.raises(ConfigError) as error:
        make()
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("kind", "codes", "condition", "says"),
    [
        ("rq", jnp.zeros((2, 3, 2, 2), jnp.int32), None, "codes of shape (2, 3, 2, 2) do not fit prior.grid=(2, 3)"),
        (
            "rq",
            jnp.zeros((2, 2, 3, 2), jnp.int32),
            jnp.zeros((2, 4), jnp.int32),
            "a condition of shape (2, 4) does not fit",
        ),
        ("hq_text", codes_of(KINDS["hq_text"])[:1], None, "codes of shapes [(3, 2, 2)] do not fit prior.grid=2"),
        ("hq_text", codes_of(KINDS["hq_text"]), None, "no condition does not fit 3 images of prior.condition=text"),
        (
            "hq_bidirectional",
            codes_of(KINDS["hq_bidirectional"]),
            jnp.zeros((3, 2), jnp.int32),
            "a condition of shape (3, 2) does not fit",
        ),
    ],
)
def test_arrays_that_do_not_fit(kind, codes, condition, says):
    with pytest.raises(ConfigError) as error:
        jax.eval_shape(functools.partial(forward, KINDS[kind]), params_of(KINDS[kind]), codes, condition)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("kind", "how", "condition", "says"),
    [
        ("rq", Sampling(scale=2.0), [[0]], "trained without prior.condition_dropout: it cannot be guided, use scale=1"),
        ("rq", (Sampling(),) * 3, [[0]], "3 ways to draw codes were given, but this prior has 2 depths or levels"),
        ("rq", Sampling(), [[5]], "condition 5 is unknown: this prior knows 0 to 4"),
        ("hq_bidirectional", Sampling(), [-1], "condition -1 is unknown: this prior knows 0 to 4"),
        ("rq", Sampling(), [[4]], "reads the tokenizer's codebook: give its table"),
    ],
)
def test_draws_that_cannot_be(kind, how, condition, says):
    with pytest.raises(ConfigError) as error:
        sampler(KINDS[kind], how)(params_of(KINDS[kind]), keys_of(1), condition)
    assert says in str(error.value)
