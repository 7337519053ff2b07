"""Rows whose slots lie over the mesh axis seq: attention equals that of one device, and no device holds all scores."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts.test_attention import packed
from tests.contracts.test_mesh import one_device, run_on
from vlm_jax.nn import attention_context, attention_plain, attention_tpu
from vlm_jax.nn.attention import Mask, attention, choose, refusal
from vlm_jax.nn.dropout import dropout_key
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh


def arrays_of(slots, rows=2, heads=4, kv_heads=2, width=8):
    """q, k, v and diagonals."""
    draw = np.random.default_rng(0).normal
    shapes = (
        (rows, slots, heads, width),
        (rows, slots, kv_heads, width),
        (rows, slots, kv_heads, width),
        (heads, 2 * slots - 1),
    )
    return [jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes]


def gradients(compute, mask, drops, *arrays):
    """Sum of squares of compute(q, k, v, mask) and its gradients by the arrays q, k, v, diagonals."""

    def loss(q, k, v, diagonals):
        return (compute(q, k, v, mask(diagonals)) ** 2).sum()

    with dropout_key(jax.random.key(3) if drops else None):
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arrays)


def assert_equal(ours, wanted, atol):
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-5)
    for name, a, b in zip(("q", "k", "v", "diagonals"), ours[1], wanted[1]):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=name)
        assert np.abs(b).max() > 0.1, name


def everything(slots):
    """A packed row with causality, a window, both kinds of bias and dropout, as a function of the diagonals."""
    ids = packed(2, slots, (slots // 3, slots // 2))
    bias = jnp.asarray(np.random.default_rng(5).normal(size=(1, 4, slots, slots)), jnp.float32)
    return lambda diagonals: Mask(True, slots // 4, ids, ids, bias=bias, diagonals=diagonals, drop=0.2, place=7)


@pytest.mark.parametrize(
    "impl, mesh",
    [
        ("dense", MeshConfig(fsdp=2, tensor=2, seq=2)),
        ("chunked", MeshConfig(fsdp=1, tensor=2, seq=4)),
        pytest.param("dense", MeshConfig(fsdp=2, tensor=1, seq=4), marks=pytest.mark.long),
        pytest.param("chunked", MeshConfig(fsdp=2, tensor=2, seq=2), marks=pytest.mark.long),
    ],
)
def test_every_mask_with_gradients_and_the_same_dropout(impl, mesh, monkeypatch):
    """Grouped heads over `tensor`, rows over `fsdp`: values, gradients and the weights dropped are those of one device."""
    if impl == "chunked":
        monkeypatch.setattr(attention_plain, "CHUNK", 4)
        monkeypatch.setattr(attention_plain, "LONG", 16)
    slots = 16
    arrays = arrays_of(slots)
    whole = functools.partial(attention, impl=impl, scale=0.3)
    wanted = gradients(whole, everything(slots), True, *arrays)
    with rules.use(make_mesh(mesh)):
        assert choose(*arrays[:2], everything(slots)(None), "cpu") == "context"
        assert attention_context.inner(*arrays[:2], everything(slots)(None), lambda _: False, "cpu") == impl
        ours = gradients(functools.partial(attention, impl="auto", scale=0.3), everything(slots), True, *arrays)
    assert_equal(ours, wanted, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, slots, window, seq",
    [
        ("splash", 1024, None, 4),  # halves of 128 slots are exchanged
        pytest.param("splash", 1024, 300, 2, marks=pytest.mark.long),
        pytest.param("splash", 256, 60, 2, marks=pytest.mark.long),  # too short to be exchanged
        pytest.param("flash", 256, 60, 2, marks=pytest.mark.long),
    ],
)
def test_tpu_kernels_inside_equal_dense(name, slots, window, seq, interpreted, monkeypatch):
    monkeypatch.setattr(attention_tpu, "TILE", 128)
    ids, arrays = packed(1, slots, (slots // 3, slots // 2)), arrays_of(slots, 1, 2, 1, 16)

    def mask(diagonals):
        return Mask(True, window, ids, ids, diagonals=diagonals if name == "flash" else None)

    def both(compute):
        total, grads = gradients(compute, mask, False, *arrays)
        return total, grads if name == "flash" else grads[:3]

    wanted = both(functools.partial(attention, impl="dense", scale=0.3))
    with rules.use(make_mesh(MeshConfig(fsdp=1, tensor=8 // seq, seq=seq))):
        ours = both(lambda q, k, v, mask: attention_context.context(q, k, v, mask, 0.3, name))
    assert_equal(ours, wanted, 1e-3)


def test_halves_are_exchanged_and_come_back():
    """Four devices compute halves 0 7, 1 6, 2 5 and 3 4."""
    slots = jnp.arange(16)[None]
    with rules.use(make_mesh(MeshConfig(data=2, fsdp=1, seq=4))) as mesh:
        shards = attention_context._Shards(mesh, (), ("seq",), (), set(mesh.axis_names))
        seen = []
        for back in (False, True):

            def part(x, back=back):
                index = jax.lax.axis_index("seq")
                x = attention_context._exchange(x, index, shards)
                return attention_context._exchange_back(x, index, shards) if back else x

            spec = jax.P(None, "seq")
            seen.append(jax.jit(jax.shard_map(part, in_specs=spec, out_specs=spec, check_vma=False))(slots))
    order = attention_context._exchanged_order(16, 4)
    assert order.tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert seen[0][0].tolist() == order.tolist() and seen[1][0].tolist() == list(range(16))


@pytest.mark.parametrize("exchanged, blocks", [(True, 17), (False, 31)])
def test_the_exchange_shares_causal_work_equally(exchanged, blocks, monkeypatch):
    """Blocks of scores that the splash kernel visits on the busiest of 8 devices, of 136 in all."""
    monkeypatch.setattr(attention_tpu, "TILE", 128)
    order = attention_context._exchanged_order(16 * 128, 8) if exchanged else None
    block = attention_tpu.splash_kernel(Mask(True), 16 * 128, 1, 8, order).fwd_mask_info.block_mask
    assert (np.asarray(block)[0].reshape(8, -1) > 0).sum(1).max() == blocks


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_no_device_holds_all_scores(impl, monkeypatch):
    """Forward and backward gather keys and values, and no array has all queries beside all keys."""
    if impl == "chunked":
        monkeypatch.setattr(attention_plain, "CHUNK", 8)
        monkeypatch.setattr(attention_plain, "LONG", 16)
    q, k, v, _ = arrays_of(64)
    ids = packed(2, 64, (30, 20))

    def loss(q, k, v):
        return (attention(q, k, v, Mask(True, None, ids, ids)) ** 2).sum()

    with rules.use(make_mesh(MeshConfig(fsdp=1, tensor=2, seq=4))) as mesh:
        lies = jax.NamedSharding(mesh, jax.P(None, "seq", "tensor"))
        step = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=lies, out_shardings=lies)
        text = step.lower(q, k, v).compile().as_text()
    assert "all-gather" in text and re.search(r"f32\[(\d+,)*(16|8),64\]", text)
    assert not re.search(r"\[(\d+,)*64,64\]", text)


@pytest.mark.long
def test_a_step_in_chunks_equals_one_device(monkeypatch):
    """Loss and gradients of the whole model, as tests/contracts/test_mesh.py asks of every mesh."""
    wanted_loss, wanted = one_device()
    monkeypatch.setattr(attention_plain, "CHUNK", 4)
    monkeypatch.setattr(attention_plain, "LONG", 16)
    loss, grads, _ = run_on(make_mesh(MeshConfig(fsdp=2, tensor=2, seq=2)))
    assert abs(loss - wanted_loss) < 1e-5
    for path, gradient in grads.items():
        np.testing.assert_allclose(np.asarray(gradient), wanted[path], atol=1e-5, err_msg=path)


def test_lowers_for_a_tpu_with_splash_inside():
    """Forward and backward: kernels, keys and values gathered, their gradients scattered, halves of the queries exchanged."""
    q, k = (jax.ShapeDtypeStruct((1, 4096, heads, 128), jnp.bfloat16) for heads in (4, 2))

    def loss(q, k, v):
        return attention_context.context(q, k, v, Mask(True), 0.1, "splash").astype(jnp.float32).sum()

    with rules.use(make_mesh(MeshConfig(fsdp=1, tensor=2, seq=4))):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3
    for collective in ("all_gather", "reduce_scatter", "collective_permute"):
        assert f"stablehlo.{collective}" in text


def test_what_context_refuses():
    q, k, *_ = arrays_of(24)
    assert "its 24 query slots do not lie over several devices" in refusal("context", q, k, Mask())
    with rules.use(make_mesh(MeshConfig(fsdp=1, data=2, seq=4))):
        assert refusal("context", q, k, Mask()) is None
        assert "its 23 query slots" in refusal("context", q[:, :23], k, Mask())
        q, k = (jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32) for _ in range(2))
        dropped = Mask(drop=0.1)
        assert choose(q, k, dropped, "cpu") == "context"
        with dropout_key(jax.random.key(0)):
            assert choose(q, k, dropped, "cpu") == "chunked"
            assert "dropout is drawn for 512 query slots at a time" in refusal("context", q, k, dropped)


def test_what_each_platform_computes_inside():
    q, k = (jax.ShapeDtypeStruct((1, 32768, 2, 128), jnp.bfloat16) for _ in range(2))
    with rules.use(make_mesh(MeshConfig(fsdp=1, seq=8))):
        for platform, mask, name in (
            ("tpu", Mask(True), "splash"),
            ("tpu", Mask(diagonals=jnp.zeros((2, 65535))), "flash"),
            ("gpu", Mask(True), "cudnn"),
            ("cpu", Mask(True), "chunked"),
        ):
            takes = functools.partial(lambda name, mask: refusal(name, q, k, mask) is None, mask=mask)
            assert attention_context.inner(q, k, mask, takes, platform) == name
