"""Contract 1: every implementation equals the dense reference on packed rows, or raises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.config import ATTENTIONS
from vlm_jax.nn import attention_plain, attention_tpu
from vlm_jax.nn.attention import Mask, attention, choose, refusal
from vlm_jax.nn.dropout import dropout_key
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.planning.collectives import collectives


def qkv(rows=2, slots=24, keys=None, heads=4, kv_heads=2, width=8, seed=0, dtype=jnp.float32):
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    keys = keys or slots
    return (
        jax.random.normal(k1, (rows, slots, heads, width), dtype),
        jax.random.normal(k2, (rows, keys, kv_heads, width), dtype),
        jax.random.normal(k3, (rows, keys, kv_heads, width), dtype),
    )


def packed(rows, slots, lengths=(9, 7)):
    ids = np.zeros((rows, slots), np.int32)
    start = 0
    for i, n in enumerate(lengths):
        ids[:, start : start + n] = i + 1
        start += n
    return jnp.asarray(ids)


def by_hand(q, k, v, segments, causal, window):
    """Attention written out with python loops over rows, heads and slots."""
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, H))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b in range(B):
        for n in range(N):
            for t in range(T):
                seen = [
                    s
                    for s in range(k.shape[1])
                    if segments[b, s] == segments[b, t]
                    and (not causal or s <= t)
                    and (window is None or s > t - window)
                ]
                g = n // (N // k.shape[2])
                scores = np.array([q[b, t, n] @ k[b, s, g] for s in seen]) / np.sqrt(H)
                w = np.exp(scores - scores.max())
                out[b, t, n] = (w / w.sum()) @ np.array([v[b, s, g] for s in seen])
    return out


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 10), st.integers(0, 8), st.booleans(), st.sampled_from([None, 1, 3]), st.sampled_from([1, 2, 4]))
def test_dense_is_attention_written_out(first, second, causal, window, kv_heads):
    q, k, v = qkv(slots=18, kv_heads=kv_heads)
    ids = packed(2, 18, (first, second))
    ours = attention(q, k, v, Mask(causal, window, ids, ids), "dense")
    np.testing.assert_allclose(ours, by_hand(q, k, v, np.asarray(ids), causal, window), atol=1e-5)


def test_rows_that_half_a_chunk_divides_are_cut_too():
    """CLIP-FlanT5's stage 1 has rows of 4864 slots, whose scores would take 14 GiB at once."""
    q = jax.ShapeDtypeStruct((1, 4864, 32, 64), jnp.bfloat16)
    assert attention_plain.chunk_of(4864) == 256 and attention_plain.chunk_of(4096) == 512
    assert attention_plain.chunk_of(1152) == 128 and attention_plain.chunk_of(1100) == 0
    with dropout_key(jax.random.key(0)):
        assert choose(q, q, Mask(diagonals=jnp.zeros((32, 2 * 4864 - 1)), drop=0.1), "tpu") == "chunked"


@pytest.mark.parametrize("window", [None, 5])
def test_chunked_equals_dense_with_gradients(window, monkeypatch):
    monkeypatch.setattr(attention_plain, "CHUNK", 8)
    q, k, v = qkv()
    ids = packed(2, 24)
    bias = jax.random.normal(jax.random.key(5), (1, 4, 24, 24))

    def run(impl):
        return jax.value_and_grad(
            lambda q, k, v: (attention(q, k, v, Mask(True, window, ids, ids, bias=bias), impl) ** 2).sum(), (0, 1, 2)
        )(q, k, v)

    (a, ga), (b, gb) = run("dense"), run("chunked")
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ga, gb)


@pytest.mark.slow
@pytest.mark.parametrize("causal, window, slots", [(True, None, 256), (True, 60, 200), (False, None, 256)])
def test_splash_equals_dense_with_gradients(causal, window, slots, interpreted, monkeypatch):
    """Several blocks, grouped heads, packed rows; slots that are no multiple of 128 are padded."""
    monkeypatch.setattr(attention_tpu, "TILE", 128)
    q, k, v = qkv(rows=1, slots=slots, heads=4, kv_heads=2, width=64)
    ids = packed(1, slots, (100, 70))
    mask = Mask(causal, window, ids, ids)

    def run(impl):
        return jax.value_and_grad(lambda q, k, v: (attention(q, k, v, mask, impl) ** 2).sum(), (0, 1, 2))(q, k, v)

    (a, ga), (b, gb) = run("splash"), run("dense")
    np.testing.assert_allclose(a, b, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), ga, gb)


@pytest.mark.slow
def test_splash_under_a_mesh_equals_dense(interpreted):
    q, k, v = qkv(rows=4, slots=128, heads=4, kv_heads=2, width=64)
    ids = packed(4, 128, (60, 50))
    mask = Mask(True, None, ids, ids)
    expected = attention(q, k, v, mask, "dense")
    with rules.use(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        got = jax.jit(lambda q, k, v: attention(q, k, v, mask, "splash"))(q, k, v)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_lowers_for_tpu_with_the_splash_kernel():
    """The kernel path compiles to a TPU custom call on a machine without a TPU."""
    q, k, v = qkv(rows=1, slots=1024, width=128, dtype=jnp.bfloat16)
    ids = packed(1, 1024, (500, 400))
    f = jax.jit(lambda q, k, v: attention(q, k, v, Mask(True, None, ids, ids), "splash"))
    text = jax.export.export(f, platforms=["tpu"])(q, k, v).mlir_module()
    assert "tpu_custom_call" in text


def with_bias(queries, keys, kind, seed=3):
    """(mask from what is added, what is added) of a packed row with a relative position bias, or with a whole one."""
    own, others = packed(2, queries, (queries // 2, queries // 3)), packed(2, keys, (keys // 3, keys // 2))
    shape = (2, queries + keys - 1) if kind == "diagonals" else (1, 2, queries, keys)
    added = jax.random.normal(jax.random.key(seed), shape)
    return lambda added: Mask(kind == "causal", 200 if kind == "causal" else None, own, others, **{
        "diagonals" if kind == "diagonals" else "bias": added
    }), added  # fmt: skip


FLASH = [("diagonals", 256, 128), ("causal", 256, 256)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, queries, keys", FLASH)
def test_flash_with_bias_equals_dense_with_gradients(kind, queries, keys, interpreted, monkeypatch):
    """On packed rows, in several chunks; the gradient of the bias too, of causality, window and bias together."""
    monkeypatch.setattr(attention_tpu, "BIASED", 128)
    q, k, v = qkv(slots=queries, keys=keys, heads=2, kv_heads=2, width=64)
    mask, added = with_bias(queries, keys, kind)

    def run(impl):
        def f(q, k, v, added):
            return (attention(q, k, v, mask(added), impl, scale=0.125) ** 2).sum()

        return jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(q, k, v, added)

    (a, ga), (b, gb) = run("flash"), run("dense")
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for name, ours, wanted in zip(("q", "k", "v", "bias"), ga, gb):
        np.testing.assert_allclose(ours, wanted, atol=1e-3, err_msg=name)
        assert np.abs(wanted).max() > 0.1, name


@pytest.mark.slow
def test_flash_across_rows_without_bias_equals_dense(interpreted):
    """The cross-attention of an encoder-decoder: fewer queries than keys, grouped heads, nothing added."""
    q, k, v = qkv(slots=128, keys=256, heads=4, kv_heads=2, width=64)
    mask = Mask(q_segments=packed(2, 128, (60, 50)), k_segments=packed(2, 256, (100, 120)))
    np.testing.assert_allclose(attention(q, k, v, mask, "flash"), attention(q, k, v, mask, "dense"), atol=1e-5)


@pytest.mark.slow
def test_flash_under_a_mesh_equals_dense(interpreted):
    """Rows over devices: the gradient of the bias adds up over them."""
    q, k, v = qkv(rows=4, slots=128, heads=2, kv_heads=2, width=64)
    ids, diagonals = packed(4, 128, (60, 50)), jax.random.normal(jax.random.key(2), (2, 255))

    def run(impl):
        def f(q, diagonals):
            return (attention(q, k, v, Mask(False, None, ids, ids, diagonals=diagonals), impl) ** 2).sum()

        return jax.jit(jax.value_and_grad(f, (0, 1)))(q, diagonals)

    with rules.use(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        loss, grads = run("flash")
    wanted_loss, wanted = run("dense")
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-4)
    for ours, theirs in zip(grads, wanted):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_gradient_of_diagonals_crosses_devices_as_diagonals(impl):
    """Summed over a device's rows and along diagonals first: T + S - 1 numbers per head, and not T S."""
    q, k, v = qkv(rows=4, slots=256, heads=2, kv_heads=2, width=64)
    ids, diagonals = packed(4, 256, (120, 100)), jax.random.normal(jax.random.key(2), (2, 511))

    def f(q, diagonals):
        return (attention(q, k, v, Mask(False, None, ids, ids, diagonals=diagonals), impl) ** 2).sum()

    both = jax.jit(jax.value_and_grad(f, (0, 1)))
    wanted_loss, wanted = both(q, diagonals)
    with rules.use(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        q, diagonals = rules.shard(q, "batch", None, "act_heads", None), rules.shard(diagonals, "act_heads", None)
        text = both.lower(q, diagonals).compile().as_text()
        loss, grads = both(q, diagonals)
    assert max(one.result for one in collectives(text, 8) if one.kind == "all-reduce") <= diagonals.nbytes
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for ours, theirs in zip(grads, wanted):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_lowers_for_tpu_with_the_flash_kernel():
    """Forward and backward of the T5 encoder's attention, with gradients of its bias, become TPU custom calls."""
    q, k, v = qkv(rows=1, slots=1024, heads=2, kv_heads=2, width=64, dtype=jnp.bfloat16)
    ids, diagonals = packed(1, 1024, (500, 400)), jnp.zeros((2, 2047))

    def f(q, k, v, diagonals):
        mask = Mask(False, None, ids, ids, diagonals=diagonals)
        return attention(q, k, v, mask, "flash", scale=1.0).astype(jnp.float32).sum()

    exported = jax.export.export(jax.jit(jax.grad(f, (0, 1, 2, 3))), platforms=["tpu"])(q, k, v, diagonals)
    assert exported.mlir_module().count("tpu_custom_call") >= 3  # forward, keys and values, queries and bias


@pytest.mark.parametrize(
    "mask, drops, words",
    [
        (Mask(diagonals=jnp.zeros((2, 511)), drop=0.1), True, "has no dropout"),
        (Mask(bias=jnp.zeros((2, 2, 256, 256))), False, "one bias for all rows"),
        (Mask(q_offset=jnp.asarray(3)), False, "and no cache"),
    ],
)
def test_what_flash_refuses(mask, drops, words):
    q, k, v = qkv(slots=256, heads=2, kv_heads=2)
    with dropout_key(jax.random.key(0) if drops else None), pytest.raises(ValueError, match=words):
        attention(q, k, v, mask, "flash")
    assert refusal("flash", q, k, dataclasses.replace(mask, bias=None, q_offset=0, drop=0.0)) is None


def test_a_tpu_is_given_the_kernel_that_takes_the_mask():
    """The encoder of T5, its cross-attention, a decoder; and a dense one where training drops attention weights."""
    q, k = (jax.ShapeDtypeStruct((1, slots, 2, 64), jnp.bfloat16) for slots in (1024, 4096))
    relative = Mask(diagonals=jnp.zeros((2, 8191)), drop=0.1)
    assert choose(k, k, relative, "tpu") == "flash" and choose(q, k, Mask(), "tpu") == "flash"
    vit = jax.ShapeDtypeStruct((8, 577, 16, 64), jnp.bfloat16)  # slots are padded to 640
    assert choose(vit, vit, Mask(), "tpu") == "splash" and choose(vit, vit, Mask(), "cpu") == "dense"
    assert choose(k, k, Mask(True), "tpu") == "splash" and choose(k, k, relative, "cpu") == "chunked"
    with dropout_key(jax.random.key(0)):
        assert choose(k, k, relative, "tpu") == "chunked"


def test_cache_offset_equals_the_last_rows_of_the_full_pass():
    q, k, v = qkv(slots=12)
    ids = packed(2, 12, (12,))
    full = attention(q, k, v, Mask(True, None, ids, ids), "dense")
    last = attention(q[:, 8:], k, v, Mask(True, None, ids[:, 8:], ids, q_offset=jnp.asarray(8)), "dense")
    np.testing.assert_allclose(last, full[:, 8:], atol=1e-6)


def test_a_row_without_keys_is_finite():
    q, k, v = qkv(slots=4)
    out = attention(q, k, v, Mask(False, None, jnp.full((2, 4), 7), jnp.zeros((2, 4), jnp.int32)), "dense")
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize("impl", [i for i in ATTENTIONS if i not in ("auto", "dense")])
def test_what_cannot_be_honoured_raises(impl):
    q, k, v = qkv(slots=24)
    with pytest.raises(ValueError, match=f"attention={impl} cannot compute this mask"):
        attention(q, k, v, Mask(True, 3, packed(2, 24), packed(2, 24), bias=jnp.zeros((2, 1, 24, 24))), impl)


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="attention='fast' is unknown: use one of auto, dense"):
        attention(*qkv(), Mask(), "fast")


def test_auto_only_chooses_what_is_exact():
    for platform in ("cpu", "gpu", "tpu"):
        for dtype in (jnp.float32, jnp.bfloat16):
            for slots in (1, 577, 1024, 2048):
                q, k, _ = (jax.ShapeDtypeStruct((1, slots, 2, 128), dtype) for _ in range(3))
                for mask in (
                    Mask(True),
                    Mask(True, 8),
                    Mask(bias=jnp.zeros((1, 1, 1, 1))),
                    Mask(q_offset=jnp.asarray(3)),
                ):
                    assert refusal(choose(q, k, mask, platform), q, k, mask) is None
