"""The table in the docstring of nn.attention is true: what says yes equals the reference, what says no raises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts.test_attention import packed, qkv
from vlm_jax.config import ATTENTIONS, ConfigError
from vlm_jax.nn import attention as module
from vlm_jax.nn import attention_plain
from vlm_jax.nn.attention import Mask, attention, refusal
from vlm_jax.nn.dropout import dropout_key
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh

SLOTS = 128


@functools.cache
def table():
    """{implementation: {column: cell}} of the docstring."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in module.__doc__.splitlines() if line[:1] == "|"]
    head, _, *body = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def parts(keys=SLOTS, start=0):
    """What each column asks of a mask over SLOTS queries of two rows, the first of which is key slot `start`."""
    draw = np.random.default_rng(1).normal
    ids = np.asarray(packed(2, SLOTS, (50, 60)))
    others = np.pad(ids, ((0, 0), (start, keys - SLOTS - start)), constant_values=1)
    return {
        "causal": {"causal": True},
        "segments": {"q_segments": jnp.asarray(ids), "k_segments": jnp.asarray(others)},
        "window": {"window": 20},
        "bias": {"bias": jnp.asarray(draw(size=(1, 2, SLOTS, keys)), jnp.float32)},
        "diagonals": {"diagonals": jnp.asarray(draw(size=(2, SLOTS + keys - 1)), jnp.float32)},
        "dropout": {"drop": 0.3},
        "cache": {"q_offset": jnp.asarray(start)},
    }


def takes(impl, columns):
    """(q, k, v, mask) with these columns of the table, in a dtype that `impl` takes."""
    keys = 2 * SLOTS if "T != S" in columns else SLOTS
    given = parts(keys, keys - SLOTS if "cache" in columns else 0)
    asked = {key: value for c in columns if c != "T != S" for key, value in given[c].items()}
    dtype = jnp.bfloat16 if impl == "cudnn" else jnp.float32
    draw = np.random.default_rng(0).normal
    q, k, v = (jnp.asarray(draw(size=(2, n, heads, 16)), dtype) for n, heads in ((SLOTS, 2), (keys, 1), (keys, 1)))
    return q, k, v, Mask(**asked)


@pytest.fixture
def meshed(request):
    """The mesh under which an implementation runs."""
    if request.param != "context":
        yield request.param
        return
    with rules.use(make_mesh(MeshConfig(fsdp=2, tensor=1, seq=4))):
        yield request.param


def test_the_table_has_every_implementation():
    assert set(table()) == set(ATTENTIONS) - {"auto"}
    assert {v for row in table().values() for k, v in row.items() if k not in ("where", "memory")} == {"yes", "no"}


@pytest.mark.parametrize("meshed", ATTENTIONS[1:], indirect=True)
def test_no_raises_and_yes_does_not(meshed, monkeypatch):
    monkeypatch.setattr(attention_plain, "CHUNK", 32)
    for column in (*parts(), "T != S"):
        q, k, v, mask = takes(meshed, [column])
        with dropout_key(jax.random.key(0)):
            if table()[meshed][column] == "yes":
                assert refusal(meshed, q, k, mask) is None, column
            else:
                with pytest.raises(ConfigError, match=f"attention={meshed} cannot compute this mask"):
                    attention(q, k, v, mask, meshed)


@pytest.mark.slow
@pytest.mark.parametrize("meshed", ATTENTIONS[2:], indirect=True)
def test_yes_equals_the_reference(meshed, interpreted, monkeypatch):
    """Everything that an implementation takes, at once; cuDNN's place is taken by jax.nn's other implementation of the same arguments."""
    monkeypatch.setattr(attention_plain, "CHUNK", 32)
    monkeypatch.setattr(attention_plain, "CUDNN", "xla")
    columns = [c for c in (*parts(), "T != S") if table()[meshed][c] == "yes"]
    if meshed == "chunked":
        columns.remove("dropout")  # drawn chunk by chunk
    q, k, v, mask = takes(meshed, columns)

    def run(impl):
        with dropout_key(jax.random.key(0)):
            return np.asarray(jax.jit(lambda q, k, v: attention(q, k, v, mask, impl))(q, k, v), np.float32)

    np.testing.assert_allclose(run(meshed), run("dense"), atol=2e-2 if meshed == "cudnn" else 1e-5)


@pytest.mark.parametrize(
    "asked",
    [{"causal": True}, {"q_segments": packed(2, SLOTS), "k_segments": packed(2, SLOTS)}],
    ids=["causal", "segments"],
)
def test_lowers_for_a_gpu_with_cudnn(asked, monkeypatch):
    """Forward and backward become cuDNN's custom calls; causality alone needs no mask."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    q, k, v = qkv(slots=SLOTS, width=64, dtype=jnp.bfloat16)

    def f(q, k, v):
        return attention(q, k, v, Mask(**asked), "cudnn").astype(jnp.float32).sum()

    text = jax.jit(jax.grad(f, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("cudnn$fmha") >= 2 and ("cudnn$fmhaScaleBias" in text) == ("q_segments" in asked)
