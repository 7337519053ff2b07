"""Chunked cross-entropy against the plain one, and what it must never hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.planning.collectives import collectives
from vlm_jax.train.losses import cross_entropy


def plain(hidden, kernel, targets, weights):
    logits = hidden @ kernel
    losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(losses * weights), jnp.sum(weights), jnp.sum((jnp.argmax(logits, -1) == targets) * weights)


def case(B=3, T=21, D=8, V=50):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    return x, w, rng.integers(0, V, (B, T)), (rng.random((B, T)) < 0.5).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 21, 1000])
def test_sums_and_gradients_equal_the_plain_loss(chunk):
    x, w, y, m = case()
    for ours, wanted in zip(cross_entropy(x, w, y, m, chunk), plain(x, w, y, m)):
        np.testing.assert_allclose(ours / m.sum(), wanted / m.sum(), atol=1e-6)
    grads = jax.grad(lambda x, w: cross_entropy(x, w, y, m, chunk).loss / m.sum(), (0, 1))(x, w)
    wanted = jax.grad(lambda x, w: plain(x, w, y, m)[0] / m.sum(), (0, 1))(x, w)
    for a, b in zip(grads, wanted):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_logits_can_be_rounded_as_bfloat16_models_round_them():
    """Values and gradients are those of the loss behind a cast to bfloat16 and back, compiled or not."""
    x, w, y, m = case()

    def behind_a_cast(x):
        rounded = (x @ w).astype(jnp.bfloat16).astype(jnp.float32)
        return plain(rounded, jnp.eye(w.shape[1]), y, m)[0]

    def ours(x):
        return cross_entropy(x, w, y, m, 7, "bfloat16").loss

    wanted, by_hand = jax.value_and_grad(behind_a_cast)(x)
    for f in (ours, jax.jit(ours)):
        loss, gradient = jax.value_and_grad(f)(x)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        np.testing.assert_allclose(gradient, by_hand, atol=0.05)
        assert abs(float(loss) - float(cross_entropy(x, w, y, m, 7).loss)) > 1e-3, "rounding matters"


def test_groups_without_loss_are_skipped_on_one_device_alone(monkeypatch):
    """The same sums and gradients as with every group computed, with weights on a tenth of the slots."""
    x, w, y, _ = case(T=32)
    m = (np.random.default_rng(1).random(y.shape) < 0.1).astype(np.float32)

    def found(one_device):
        monkeypatch.setattr("vlm_jax.train.losses.rules.alone", lambda: one_device)

        def loss(x, w):
            sums = cross_entropy(x, w, y, m, 4)
            return sums.loss, sums

        assert ("cond" in str(jax.make_jaxpr(loss)(x, w))) == one_device
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found(True), found(False))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(1, 8, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 2, 1, 4), (1, 1, 4, 2)], ids=str
)
@pytest.mark.parametrize("rows", [8, 2])
def test_devices_sum_over_what_they_hold(sizes, rows, dtype):
    """On every mesh the same sums and gradients, and the kernel and its gradient cross the links once, not once a group."""
    x, w, y, m = map(jnp.asarray, case(B=rows, T=64, D=16, V=96))

    def loss(x, w):
        sums = cross_entropy(x.astype(dtype), w, y, m, 8)
        return sums.loss, sums

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, sums), wanted = both(x, w)
    with rules.use(make_mesh(MeshConfig(*sizes))):
        x, w = rules.shard(x, "batch", "length", None), rules.shard(w, "embed", "vocab")
        (_, found), grads = both(x, w)
        text = both.lower(x, w).compile().as_text()
    np.testing.assert_allclose(found, sums, rtol=1e-5)
    for ours, theirs in zip(grads, wanted):
        assert jnp.abs(ours - theirs).max() <= jnp.abs(theirs).max() * (1e-6 if dtype == jnp.float32 else 2e-2)
    assert all(one.runs == 1 for one in collectives(text, 8) if one.result > 4 * 64), "more than a number per slot"


def test_no_supervised_token_gives_zeros():
    x, w, y, m = case()
    sums = cross_entropy(x, w, y, m * 0, 8)
    assert [float(s) for s in sums] == [0, 0, 0]


def test_large_logits_do_not_overflow():
    x, w, y, m = case()
    assert np.isfinite(float(cross_entropy(x * 1e4, w, y, m, 8).loss))


def test_memory_holds_one_group_of_logits():
    B, T, D, V = 2, 256, 16, 4096

    def temporary(chunk):
        arrays = [
            jax.ShapeDtypeStruct(s, d)
            for s, d in (((B, T, D), "float32"), ((D, V), "float32"), ((B, T), "int32"), ((B, T), "float32"))
        ]
        loss = jax.jit(jax.grad(lambda x, w, y, m: cross_entropy(x, w, y, m, chunk).loss, (0, 1)))
        return loss.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(T) / 4
    assert temporary(16) < B * T * V * 4  # less than the float32 logits of the batch
