"""Quantisers by themselves: search in tiles, ties, entropy in parts, the ramp towards a language model, checkpoints both ways."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm_jax.config import ConfigError
from vlm_jax.nn.params import split
from vlm_jax.visual_tokenizers import codebook, language, names
from vlm_jax.visual_tokenizers.language import Language
from vlm_jax.visual_tokenizers.options import AutoencoderConfig, QuantizerConfig, TokenizerConfig
from vlm_jax.visual_tokenizers.quantizers import VQ, Averaged, Residual, entropy_loss
from vlm_jax.visual_tokenizers.tokenizer import VisualTokenizer

TINY = AutoencoderConfig(width=32, multipliers=(1, 1), blocks=1, attention=(8,), resolution=16, latent=8)
KINDS = {
    "vq": QuantizerConfig(codes=(12,), width=4, normalise=True),
    "rq": QuantizerConfig(kind="rq", codes=(12,), width=4, depth=2),
    "rq_shared": QuantizerConfig(kind="rq", codes=(12,), width=4, depth=2, shared=True, restart=True),
    "hq": QuantizerConfig(kind="two_level", codes=(12, 10), width=4),
    "hq_nearest": QuantizerConfig(kind="two_level", codes=(12,), width=4, upsample="nearest", shared=True),
    "hq_conv": QuantizerConfig(kind="two_level", codes=(12,), width=4, upsample="conv"),
    "hq3": QuantizerConfig(kind="levels", codes=(12, 10, 8), width=4),
    "hq3_conv": QuantizerConfig(kind="levels", codes=(12, 10, 8), width=4, upsample="conv"),
    "unicode_hq": QuantizerConfig(kind="two_level", codes=(12,), width=8, shared=True, language=True, length=3.0),
    "unicode_rq": QuantizerConfig(kind="rq", codes=(12,), width=8, shared=True, language=True, length=3.0, depth=2),
}


@pytest.mark.parametrize("tile", [1, 7, 64, 100, 1024])
def test_search_in_tiles_finds_what_the_whole_matrix_finds(tile):
    z, table = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((0, (5, 40, 6)), (1, (100, 6))))
    dense = codebook.distances(z.reshape(-1, 6), table)
    found = codebook.nearest(z, table, tile).reshape(-1)
    best = np.sort(dense, axis=1)
    sure = best[:, 1] - best[:, 0] > 1e-4
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(found[sure], dense.argmin(1)[sure])


@pytest.mark.parametrize("tile", [1, 3, 4, 16])
def test_ties_go_to_the_lowest_index(tile):
    table = jnp.asarray([[4.0, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])
    np.testing.assert_array_equal(codebook.nearest(jnp.asarray([[1.0, 0], [0, 1], [0.5, 0.5]]), table, tile), [1, 2, 1])


def test_the_whole_distance_matrix_never_exists():
    n, k, tile = 512, 4096, 128
    shapes = jax.ShapeDtypeStruct((n, 8), jnp.float32), jax.ShapeDtypeStruct((k, 8), jnp.float32)
    program = jax.jit(lambda z, table: codebook.nearest(z, table, tile)).lower(*shapes).compile()
    assert program.memory_analysis().temp_size_in_bytes < n * k * 4 / 8


def test_entropy_in_parts_equals_entropy_at_once():
    z, table = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((2, (1500, 4)), (3, (20, 4))))

    def dense(z):
        p = jax.nn.softmax(-codebook.distances(z, table) / 0.5, axis=-1)
        mean = p.mean(0)
        return -jnp.mean(jnp.sum(p * jnp.log(p + 1e-30), -1)) + jnp.sum(mean * jnp.log(mean + 1e-5))

    (a, da), (b, db) = (jax.value_and_grad(f)(z) for f in (dense, lambda z: entropy_loss(z, table, 0.5)))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(da, db, atol=1e-7, rtol=1e-3)


def test_a_vq_table_learns_from_its_own_loss_only():
    quantizer = VQ(KINDS["vq"])
    state, z = quantizer.initial(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 3, 4))
    grad = jax.grad(lambda s: quantizer.encode(z, s).latents.sum())(state)
    np.testing.assert_array_equal(grad["embedding"], 0)
    grad = jax.grad(lambda s: quantizer.encode(z, s).losses["vq"])(state)
    assert np.abs(grad["embedding"]).max() > 0


def test_unused_codes_restart_from_the_batch():
    c = dataclasses.replace(KINDS["rq_shared"], depth=1)
    book = Averaged(c, 12, 4)
    state, z = book.initial(jax.random.key(0)), jax.random.normal(jax.random.key(1), (30, 4)) + 5
    after = book.encode(z, state, train=True, draw=codebook.draws_from(jax.random.key(2))).state
    np.testing.assert_array_equal(after["cluster_size"], 1)
    distance = codebook.distances(after["embedding_sum"], z).min(1)
    assert distance.max() < 1e-3, "every code, all of which were unused, is a vector of the batch"
    few = codebook.draws_from(jax.random.key(2))(z[:5], 12)
    assert few.shape == (12, 4) and len(np.unique(np.asarray(few), axis=0)) == 12
    same = book.encode(z, state, train=False).state
    assert all((same[name] == state[name]).all() for name in state)


def test_unshared_depths_are_separate_tables():
    quantizer = Residual(KINDS["rq"])
    state, z = quantizer.initial(jax.random.key(0)), jax.random.normal(jax.random.key(1), (6, 4))
    found = quantizer.encode(z, state)
    rows = [state["embedding"][d][found.codes[:, d]] for d in range(2)]
    np.testing.assert_allclose(found.latents, sum(rows), atol=1e-6)
    np.testing.assert_allclose(quantizer.decode(found.codes, state), sum(rows), atol=1e-6)


def test_at_the_end_of_the_ramp_the_codebook_is_the_language_models():
    quantizer = Language(KINDS["unicode_rq"])
    table = 2 * np.random.RandomState(0).standard_normal((30, 8)).astype(np.float32)
    state = quantizer.initial(jax.random.key(0), table)
    z = 9 * jax.random.normal(jax.random.key(1), (40, 8))
    after = quantizer.encode(z, state, train=True, ratio=language.alignment(7, 7)).state
    np.testing.assert_allclose(after["post_length"], 1, rtol=1e-5)
    np.testing.assert_allclose(after["embedding"], table[np.asarray(state["tokens"])], rtol=1e-5)
    np.testing.assert_allclose(language.cosine_gap(after), 0, atol=1e-6)
    free = quantizer.encode(z, state, train=True, ratio=language.alignment(0, 7)).state
    np.testing.assert_allclose(np.linalg.norm(free["embedding"], axis=1), state["language_lengths"], rtol=1e-5)
    assert language.cosine_gap(free) > 0.1


def test_too_few_long_token_embeddings():
    table = np.eye(8, dtype=np.float32) * np.linspace(0.5, 1.5, 8)[:, None]
    np.testing.assert_array_equal(language.choose_rows(table, 3), [4, 5, 6])
    with pytest.raises(ConfigError, match="only 4 token embeddings"):
        language.choose_rows(table, 5)
    with pytest.raises(ConfigError, match="exceeds the 8 token embeddings"):
        language.choose_rows(table, 9)


def test_usage_and_perplexity():
    histogram = codebook.usage(jnp.asarray([[0, 1], [2, 3]]), 4)
    np.testing.assert_allclose(codebook.perplexity(histogram), 4, rtol=1e-6)
    np.testing.assert_allclose(codebook.perplexity(codebook.usage(jnp.zeros(5, int), 4)), 1, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_leave_as_they_came(kind):
    config = TokenizerConfig(TINY, KINDS[kind], "llamagen" if kind == "vq" else "taming")
    rng = np.random.RandomState(0)
    model = nnx.eval_shape(lambda: VisualTokenizer(config, nnx.Rngs(0)))
    abstract = dict(split(model)[1]), jax.eval_shape(model.initial, jax.random.key(1))
    params, books = jax.tree.map(lambda x: rng.randint(0, 12, x.shape).astype(x.dtype), abstract)
    tensors = names.write(config, params, books)
    assert set(tensors) == {e.key for e in names.entries(config)}
    assert all(tensors[e.key].shape == e.shape for e in names.entries(config))
    again, codebooks = names.read(config, tensors)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    jax.tree.map(np.testing.assert_array_equal, codebooks, books)
    missing = {k: v for k, v in tensors.items() if k != "decoder.conv_out.bias"}
    with pytest.raises(ConfigError, match="no tensor decoder.conv_out.bias"):
        names.read(config, missing)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kind": "pq"}, "quantizer.kind='pq'"),
        ({"kind": "levels", "codes": (8,)}, "one number per level"),
        ({"kind": "two_level", "language": True}, "shared=True"),
        ({"kind": "two_level", "shared": True}, "equally wide"),
        ({"codes": ()}, "one positive number"),
    ],
)
def test_configs_that_cannot_be_run(wrong, says):
    with pytest.raises(ConfigError, match=says):
        QuantizerConfig(**wrong)


def test_images_that_do_not_divide():
    model = nnx.eval_shape(lambda: VisualTokenizer(TokenizerConfig(TINY, KINDS["vq"]), nnx.Rngs(0)))
    with pytest.raises(ConfigError, match="multiples of 2"):
        model.latents(jnp.zeros((1, 15, 16, 3)))
