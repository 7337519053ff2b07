"""FID against pytorch-fid: the network's tensors and features, the distance of stored moments, and folders of pictures."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from tests.golden_tokenizers import formula, load
from tests.goldens import beside, golden
from vlm_jax.evaluate import inception
from vlm_jax.evaluate.frechet import Moments, collect, frechet_distance


@functools.cache
def shapes(manifest):
    return json.loads(manifest.read_text())["tensors"]


@functools.cache
def tensors(manifest, seed):
    """The state dict that the README of the goldens describes."""
    found = {}
    for name, shape in shapes(manifest).items():
        if shape:
            made = formula(name, tuple(shape), seed)
            found[name] = made * np.float32(np.sqrt(2)) if len(shape) >= 3 else made
    return found


@functools.cache
def network(manifest, seed, dims, batch=3):
    return inception.Inception(inception.read_inception(tensors(manifest, seed)), dims, batch)


def of(path):
    """(arrays, the network of a case by dims)."""
    arrays, info = load(path)
    manifest = beside(path, "inception_fid_manifest.json")
    return arrays, functools.partial(network, manifest, info["weight_seed"])


def pictures(nchw):
    return list(np.moveaxis(nchw, 1, -1))


@golden("unified", "inception_*manifest.json")
def test_every_convolution_of_the_published_file_is_used(path):
    convolutions = {name.removesuffix(".conv.weight") for name in shapes(path) if name.endswith(".conv.weight")}
    assert convolutions == set(inception.convolutions()) and len(inception.convolutions()) == len(convolutions)


@pytest.mark.slow
@golden("unified", "inception_features*.npz")
def test_features(path):
    arrays, info = load(path)
    params = inception.read_inception(tensors(beside(path, "inception_fid_manifest.json"), info["weight_seed"]))

    @jax.jit
    def all_features(params, images):
        return {dims: inception.features(params, inception.resize(images), dims) for dims in inception.DIMS}

    found = all_features(params, np.moveaxis(arrays["images_uint8_nchw"], 1, -1))
    for dims, key in ((64, "block0_mean"), (192, "block1_mean"), (768, "block2_mean"), (2048, "pool3")):
        if key in arrays:
            np.testing.assert_allclose(found[dims], arrays[key], rtol=2e-3, atol=1e-5, err_msg=key)


@golden("unified", "frechet*.npz")
def test_distance_of_moments(path):
    arrays, _ = load(path)
    for key, want in ((k, v) for k, v in arrays.items() if k.startswith("case") and k.endswith("_fid")):
        case = key.removesuffix("_fid")
        a, b = (Moments(arrays[f"{case}_mu{i}"], arrays[f"{case}_sigma{i}"]) for i in "12")
        rank = min(np.linalg.matrix_rank(m.sigma) for m in (a, b))
        np.testing.assert_allclose(frechet_distance(a, b), want, rtol=1e-6 if rank == a.mu.size else 1e-5)
    if "same_mu" in arrays:
        same = Moments(arrays["same_mu"], arrays["same_sigma"])
        assert frechet_distance(same, same) == pytest.approx(float(arrays["same_fid"]), abs=1e-6)
    if "zero_fid" in arrays:
        zeros, ones = Moments(np.zeros(4), np.zeros((4, 4))), Moments(np.ones(4), np.eye(4))
        assert frechet_distance(zeros, ones) == pytest.approx(float(arrays["zero_fid"]), rel=1e-12)


@golden("unified", "fid_end_to_end*.npz")
def test_fid_of_two_folders(path):
    arrays, net = of(path)
    for dims in inception.DIMS:
        if f"fid_dims{dims}" not in arrays:
            continue
        moments = [
            collect([net(dims)(pictures(arrays[f"images_{side}"]))], dims).moments(f"folder {side}") for side in "ab"
        ]
        np.testing.assert_allclose(frechet_distance(*moments), arrays[f"fid_dims{dims}"], rtol=1e-3)
