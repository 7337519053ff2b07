"""Quantised kernels against a direct transcription of bitsandbytes' definition, on the torch layout and a value at a time."""

import dataclasses
from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vlm_jax.config import ConfigError, LLMConfig, QuantConfig, VisionConfig, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.models.quantised import kernel_of, quantised
from vlm_jax.nn import quantise
from vlm_jax.nn.quantise import NESTED, NF4

NF4_DOUBLE, NF4_SINGLE, INT8 = QuantConfig(), QuantConfig(double=False), QuantConfig("int8")
KINDS = {"nf4": NF4_SINGLE, "nf4_double": NF4_DOUBLE, "int8": INT8}


def kernel(inputs=128, outputs=24, seed=0):
    """[in, out], some rows of another size and one block of zeros."""
    w = np.random.default_rng(seed).normal(0, 0.05, (inputs, outputs)).astype(np.float32)
    w[:, 3] *= 40
    w[:64, 5] = 0
    return w


def dynamic_values():
    """The signed dynamic map: 7 exponents, 2^i fractions each, 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent
        for k in range(parts):
            left, right = (0.1 + 0.9 * (k + side) / parts for side in (0, 1))
            values += [sign * 10.0 ** (exponent - 6) * (left + right) / 2 for sign in (1, -1)]
    return sorted(values)


def nearest(table, x):
    return min(range(len(table)), key=lambda i: abs(table[i] - x))


def direct(w, double):
    """(codes [out, in], absmax [out * in / 64], nested scale, mean) of torch's weight [out, in] = w.T."""
    flat = w.T.reshape(-1, 64)
    absmax = np.abs(flat).max(axis=1)
    codes = np.array([[7 if m == 0 else nearest(NF4, x / m) for x in block] for block, m in zip(flat, absmax)])
    if not double:
        return codes.reshape(w.T.shape), absmax, None, None
    mean, table = absmax.mean(), dynamic_values()
    centred = absmax - mean
    scales = [np.abs(centred[i : i + 256]).max() for i in range(0, len(centred), 256)]
    found = [nearest(table, x / scales[i // 256]) for i, x in enumerate(centred)]
    restored = np.array([np.float32(table[c]) * scales[i // 256] for i, c in enumerate(found)]) + mean
    return codes.reshape(w.T.shape), restored, np.array(scales), mean


def test_the_table_holds_the_quantiles_of_the_normal_distribution():
    """16 values: 8 quantiles above, 7 below and 0, between the probabilities 1 - 0.9677083 and 0.9677083, scaled to 1."""
    quantile, edge = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    np.testing.assert_allclose(np.sort([*above, *below, 0.0]) / max(above), NF4, atol=1e-6)


def test_the_dynamic_map():
    table = quantise.dynamic_map()
    assert len(set(table.tolist())) == 256 and table[127] == 0 and table[-1] == 1
    np.testing.assert_allclose(table, dynamic_values(), rtol=1e-6)
    assert table[-2] == np.float32(0.99296875) and table[128] == np.float32(5.5e-7)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_bitsandbytes(double):
    w = kernel(256, 40)
    quant = NF4_DOUBLE if double else NF4_SINGLE
    leaves = quantise.quantise(w, quant)
    codes, absmax, scales, mean = direct(w, double)
    packed = leaves["kernel_codes"]
    np.testing.assert_array_equal(packed >> 4, codes.T[0::2])  # torch packs the first of two into the high nibble
    np.testing.assert_array_equal(packed & 15, codes.T[1::2])
    if double:
        np.testing.assert_allclose(leaves["kernel_absmax_scale"], scales, rtol=1e-6)
        np.testing.assert_allclose(leaves["kernel_absmax_mean"], mean, rtol=1e-6)
    wanted = NF4[codes] * np.repeat(absmax, 64).reshape(codes.shape)
    np.testing.assert_allclose(quantise.dequantise(leaves, quant, np.float32, np), wanted.T, atol=1e-6)


def test_int8_is_bitsandbytes():
    w = kernel()
    leaves = quantise.quantise(w, INT8)
    absmax = np.abs(w).max(axis=0)
    np.testing.assert_array_equal(leaves["kernel_int8"], np.round(w * (127 / absmax)))
    np.testing.assert_allclose(leaves["kernel_scale"], absmax / 127, rtol=1e-6)
    assert np.abs(quantise.dequantise(leaves, INT8, np.float32, np) - w).max() <= (absmax / 254).max() * 1.001


@pytest.mark.parametrize(
    "kind, source", [("nf4", np.float16), ("nf4_double", ml_dtypes.bfloat16), ("int8", np.float32)]
)
def test_numpy_and_jax_agree(kind, source):
    quant, w = KINDS[kind], kernel().astype(source)
    mine, theirs = quantise.quantise(w, quant), jax.jit(lambda w: quantise.quantise(w, quant, jnp))(w)
    shapes = quantise.layout(w.shape, ("embed", "mlp"), quant)
    assert mine.keys() == theirs.keys() == shapes.keys()
    for name, like in shapes.items():
        assert mine[name].shape == theirs[name].shape == like.shape and len(like.axes) == len(like.shape), name
        assert mine[name].dtype == theirs[name].dtype == like.dtype, name
    ours = quantise.dequantise(mine, quant, np.float32, np)
    for dtype, error in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        read = jax.jit(lambda x: quantise.dequantise(x, quant, dtype))(mine)
        assert read.dtype == dtype
        np.testing.assert_allclose(np.asarray(read, np.float32), ours, atol=error, rtol=error)
    np.testing.assert_allclose(quantise.dequantise(theirs, quant, np.float32, np), ours, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind, bits", [("nf4", 4.5), ("nf4_double", 4.127), ("int8", 8.008)])
def test_bits_per_weight(kind, bits):
    shape = (4096, 4096)
    size = sum(
        np.prod(x.shape) * np.dtype(x.dtype).itemsize
        for x in quantise.layout(shape, (None, None), KINDS[kind]).values()
    )
    assert round(8 * size / np.prod(shape), 3) == bits


@pytest.mark.parametrize("kind, error", [("nf4", 0.092), ("nf4_double", 0.094), ("int8", 0.009)])
def test_how_much_a_normal_kernel_loses(kind, error):
    w = np.random.default_rng(0).normal(size=(1024, 256)).astype(np.float32)
    back = quantise.dequantise(quantise.quantise(w, KINDS[kind]), KINDS[kind], np.float32, np)
    assert np.abs(back - w).mean() / np.abs(w).mean() < error


def test_a_kernel_of_zeros_stays_one():
    for quant in KINDS.values():
        back = quantise.dequantise(quantise.quantise(np.zeros((64, 3), np.float32), quant), quant, np.float32, np)
        assert not back.any()


SMALL = VLMConfig(
    vision=VisionConfig(image_size=28, width=16, layers=2, heads=2, mlp=32),
    llm=LLMConfig(vocab=32, width=64, mlp=128, layers=3, heads=4, kv_heads=2, head_dim=16),
)


class Recorded:
    """Weights in numpy that remember which slices were read."""

    def __init__(self, config):
        rng = np.random.default_rng(0)
        self.arrays = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in vlm.shapes(config).items()}
        self.asked = []

    def __contains__(self, path):
        return path in self.arrays

    def read(self, path, index):
        found = self.arrays[path][index]
        self.asked.append((path, found.size))
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_quantised_while_they_are_read(kind):
    config = dataclasses.replace(SMALL, quant=KINDS[kind])
    plain = Recorded(SMALL)
    source, shapes = quantised(plain, config), vlm.shapes(config)
    read = {path: source.read(path, tuple(slice(0, n) for n in x.shape)) for path, x in shapes.items()}
    for path, value in read.items():
        assert path in source and value.shape == shapes[path].shape and value.dtype == shapes[path].dtype, path
    assert "llm/blocks/attn/q/kernel" not in read and "llm/head/kernel" in read and "tower/blocks/attn/q/kernel" in read
    blocks = [(path, size) for path, size in plain.asked if path.startswith("llm/blocks/") and path.endswith("kernel")]
    assert len(blocks) == 3 * 7, "each layer of each linear is read once"
    assert all(size == plain.arrays[path].size // 3 for path, size in blocks), "one layer at a time"
    path = "llm/blocks/mlp/down/kernel"
    back = kernel_of(read, path, config.quant)
    one = quantise.quantise(plain.arrays[path][1], config.quant)
    np.testing.assert_array_equal(back[1], quantise.dequantise(one, config.quant, np.float32, np))


def test_slices_are_those_of_the_whole():
    source, name = (
        quantised(Recorded(SMALL), dataclasses.replace(SMALL, quant=NF4_DOUBLE)),
        "llm/blocks/mlp/up/kernel_codes",
    )
    whole = source.read(name, (slice(0, 3), slice(0, 32), slice(0, 128)))
    np.testing.assert_array_equal(source.read(name, (slice(1, 2), slice(8, 16), slice(64, 128))), whole[1:2, 8:16, 64:])


def test_random_kernels_are_quantised_too():
    quant = QuantConfig(targets=("^llm/blocks/(attn/q|mlp/down)$",))
    config = dataclasses.replace(SMALL, quant=quant)
    params = jax.device_get(vlm.init(config, 0))
    for path, linear in (("llm/blocks/attn/q/kernel", 64), ("llm/blocks/mlp/down/kernel", 128)):
        values = kernel_of(params, path, quant)
        assert values.shape[0] == 3 and values.shape[1] == linear
        assert abs(values.std() - config.llm.init_std) < 0.002 and abs(values.mean()) < 0.002
        assert len({layer.tobytes() for layer in values}) == 3, "layers differ"


def test_what_cannot_be_cut_into_blocks():
    config = dataclasses.replace(SMALL, quant=QuantConfig(targets=("^tower/blocks/",)))
    with pytest.raises(ConfigError, match="model.quant.block=64 does not divide the 16 inputs of tower/blocks/attn/"):
        vlm.shapes(config)
    with pytest.raises(
        ConfigError, match="model.quant.targets has '\\^llm/bloks/', which matches no linear: there are .*llm/head"
    ):
        vlm.shapes(dataclasses.replace(SMALL, quant=QuantConfig(targets=("^llm/bloks/",))))
    with pytest.raises(ConfigError, match="model.quant.block=7 must be even"):
        QuantConfig(block=7)
    with pytest.raises(ConfigError, match="model.quant.kind='fp4' is unknown: use one of nf4, int8"):
        QuantConfig("fp4")


def test_nested_scales_follow_torch_order():
    """Two outputs with scales of their own end up in different groups only where torch's flattened order says so."""
    w = np.random.default_rng(0).normal(size=(64 * 16, 32)).astype(np.float32)
    w[:, 16:] *= 100  # outputs 0-15 fill the first 256 blocks of 64
    leaves = quantise.quantise(w, NF4_DOUBLE)
    assert leaves["kernel_absmax_scale"].shape == (16 * 32 // NESTED,)
    absmax = np.abs(w.T.reshape(-1, 64)).max(axis=1)
    centred = np.abs(absmax - absmax.mean()).reshape(2, 256).max(axis=1)
    np.testing.assert_allclose(leaves["kernel_absmax_scale"], centred, rtol=1e-5)
