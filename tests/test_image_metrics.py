"""PSNR, SSIM and codebook numbers against their definitions written out, and statistics of features that are merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.config import UserError
from vlm_jax.evaluate import image_metrics
from vlm_jax.evaluate.frechet import Moments, Statistics, collect, frechet_distance, over_processes, read_statistics
from vlm_jax.evaluate.image_metrics import CodeCounts, mse, psnr, same_size, ssim
from vlm_jax.visual_tokenizers import perceptual
from vlm_jax.visual_tokenizers.options import QuantizerConfig


def pairs(seed=0, shape=(3, 12, 15, 3)):
    """Three pairs: equal but for noise, unlike, and nearly saturated."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 12, shape), 0, 255).astype(np.uint8)
    b[1] = rng.integers(0, 256, shape[1:])
    a[2], b[2] = 255 - a[2] // 32, 255 - a[2] // 16
    return a, b


def written_out_ssim(a, b, data_range):
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for y in range(a.shape[0] - 6):
        for x in range(a.shape[1] - 6):
            for channel in range(a.shape[2]):
                p, q = (i[y : y + 7, x : x + 7, channel].astype(np.float64).reshape(-1) for i in (a, b))
                cov = np.cov(p, q)
                luminance = (2 * p.mean() * q.mean() + c1) / (p.mean() ** 2 + q.mean() ** 2 + c1)
                values.append(luminance * (2 * cov[0, 1] + c2) / (cov[0, 0] + cov[1, 1] + c2))
    return np.mean(values)


@pytest.mark.parametrize("data_range", [255.0, image_metrics.SSIM_RANGE_2])
def test_ssim_is_its_definition(data_range):
    a, b = pairs()
    want = [written_out_ssim(x, y, data_range) for x, y in zip(a, b)]
    np.testing.assert_allclose(ssim(a, b, data_range), want, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(ssim(a, a, data_range), 1.0, rtol=1e-6)
    assert max(want[1:]) < want[0] < 1


def test_ssim_and_psnr_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pairs(1, (3, 40, 33, 3))
    for data_range in (255.0, 510.0):
        want = [metrics.structural_similarity(x, y, data_range=data_range, channel_axis=-1) for x, y in zip(a, b)]
        np.testing.assert_allclose(ssim(a, b, data_range), want, rtol=2e-6, atol=1e-7)
    want = [metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b)]
    np.testing.assert_allclose(psnr(mse(a, b)), want, rtol=1e-6)


def test_psnr_is_its_definition_also_for_large_images():
    a, b = pairs(2, (3, 256, 300, 3))
    gap = a.astype(np.float64) - b
    np.testing.assert_allclose(psnr(mse(a, b)), 10 * np.log10(255**2 / (gap**2).mean((1, 2, 3))), rtol=1e-6)
    assert np.isinf(psnr(mse(a, a))).all()
    black, white = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    assert psnr(mse(black, white)) == pytest.approx(0, abs=1e-6)


def test_images_that_cannot_be_compared_are_named():
    with pytest.raises(UserError, match="a.png: 5 x 9 and 6 x 9 pixels cannot be compared"):
        same_size((9, 5, 3), (9, 6, 3), "a.png")
    with pytest.raises(UserError, match="a.png: 5 x 9 pixels is too small"):
        same_size((9, 5, 3), (9, 5, 3), "a.png")


def test_code_counts():
    flat = CodeCounts(QuantizerConfig(codes=(8,)))
    flat.add([np.asarray([[[0, 1], [2, 3]]])])
    flat.add([np.asarray([[[0, 1], [2, 3]]])])
    found = flat.summary()["codebook"]
    assert (found["codes"], found["usage"]) == (8, 0.5) and found["perplexity"] == pytest.approx(4)
    depth = CodeCounts(QuantizerConfig("rq", (4,), shared=True, depth=2))
    depth.add([np.asarray([[[[0, 3], [0, 2]]]])])
    found = depth.summary()
    assert set(found) == {"depth_0", "depth_1", "table"}
    assert [found[k]["usage"] for k in ("depth_0", "depth_1", "table")] == [0.25, 0.5, 0.75]
    assert [found[k]["perplexity"] for k in ("depth_0", "depth_1")] == pytest.approx([1, 2])
    two = CodeCounts(QuantizerConfig("two_level", (4, 5)))
    two.add([np.asarray([[[1]]]), np.asarray([[[1, 2], [3, 4]]])])
    assert {k: (v["codes"], v["usage"]) for k, v in two.summary().items()} == {"top": (4, 0.25), "bottom": (5, 0.8)}
    three = CodeCounts(QuantizerConfig("levels", (2, 4, 8)))
    three.add([np.asarray([[[1]]]), np.asarray([[[3]]]), np.asarray([[[7]]])])
    assert {k: v["codes"] for k, v in three.summary().items()} == {"level_0": 2, "level_1": 4, "level_2": 8}


def test_statistics_do_not_depend_on_how_rows_arrive():
    rows = np.random.default_rng(0).normal(3, 2, (2500, 5)).astype(np.float32) + np.arange(5)
    for blocks in ([rows], np.array_split(rows, 7), np.array_split(rows, 400), [rows[:1], rows[1:]]):
        found = collect(blocks, 5).moments("rows")
        np.testing.assert_allclose(found.mu, rows.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.sigma, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-10)
        assert (found.count, found.full_rank) == (2500, True)
    a, b = (collect([part], 5) for part in (rows[:700], rows[700:]))
    np.testing.assert_allclose(a.merge(b).scatter, b.merge(a).scatter, rtol=1e-10)
    assert over_processes(a) is a and Statistics.nothing(5).merge(a) is a and a.merge(Statistics.nothing(5)) is a
    assert not collect([rows[:5]], 5).moments("rows").full_rank


def test_distances_whose_values_are_known():
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    s, t = rng.uniform(0.1, 4, (2, 6))
    t[3:] = 0  # without full rank
    a, b = (Moments(rng.normal(size=6), basis @ np.diag(v) @ basis.T) for v in (s, t))
    want = ((a.mu - b.mu) ** 2).sum() + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()  # they commute
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-7) == frechet_distance(b, a)
    assert frechet_distance(b, b) == pytest.approx(0, abs=1e-9)


def test_statistics_files(tmp_path):
    made = collect([np.random.default_rng(0).normal(size=(9, 4))], 4).moments("made")
    made.save(tmp_path / "s.npz")
    again = read_statistics(tmp_path / "s.npz")
    assert again.count == 9 and (again.mu == made.mu).all() and (again.sigma == made.sigma).all()
    np.savez(tmp_path / "plain.npz", mu=made.mu, sigma=made.sigma.astype(np.float32))  # as other programs write it
    assert read_statistics(tmp_path / "plain.npz").count == 0
    assert frechet_distance(made, read_statistics(tmp_path / "plain.npz")) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "arrays, sentence",
    [
        ({"features": np.zeros(3)}, "has no mu and sigma, only features: write one with --statistics"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"mu has shape \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.zeros(2), "sigma": np.eye(2) * np.nan}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)}, "of the ADM evaluator"),
    ],
)
def test_wrong_statistics_files_are_named(tmp_path, arrays, sentence):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(UserError, match=f"wrong.npz.*{sentence}"):
        read_statistics(tmp_path / "wrong.npz")


def test_statistics_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match="text.npz is no npz file with mu and sigma"):
        read_statistics(tmp_path / "text.npz")
    with pytest.raises(UserError, match="none.npz does not exist"):
        read_statistics(tmp_path / "none.npz")
    with pytest.raises(UserError, match="DIR has 1 usable images: a covariance needs at least 2"):
        collect([np.zeros((1, 3))], 3).moments("DIR")
    small, large = (Moments(np.zeros(d), np.eye(d), source=f"{d}.npz") for d in (2, 3))
    with pytest.raises(UserError, match="2.npz has 2 features and 3.npz 3: compare statistics of the same --dims"):
        frechet_distance(small, large)
    with pytest.raises(UserError, match="bad: sigma has the eigenvalue -1, so it is no covariance"):
        frechet_distance(small, Moments(np.zeros(2), np.diag([1.0, -1.0]), source="bad"))


def test_lpips_of_uint8_images_is_that_of_the_scaled_ones():
    rng = np.random.default_rng(0)
    params, width = {}, 3
    for k, numbers in enumerate(perceptual.SLICES):
        for n in numbers:
            params[f"conv_{n}/kernel"] = rng.normal(size=(3, 3, width, 4)).astype(np.float32)
            params[f"conv_{n}/bias"], width = np.zeros(4, np.float32), 4
        params[f"lin_{k}"] = rng.uniform(size=4).astype(np.float32)
    a, b = pairs(3, (3, 16, 16, 3))
    want = jax.jit(perceptual.lpips)(params, *(jnp.asarray(x, jnp.float32) / 127.5 - 1 for x in (a, b)))
    # images that are nearly equal have nearly equal features: a share of the features' rounding, not of the distance's
    np.testing.assert_allclose(image_metrics.lpips(params, a, b), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(image_metrics.lpips(params, a, a), 0, atol=1e-7)
