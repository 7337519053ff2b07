"""Initial weights of models that are trained from nothing."""

import dataclasses

import numpy as np
import pytest

from vlm_jax.config import ConfigError, LLMConfig, T5Config, VisionConfig, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.models.scratch import POSITION_STD, standard_deviation

MODEL = VLMConfig(
    VisionConfig(image_size=56, patch_size=14, width=64, layers=3, heads=4, mlp=128),
    llm=LLMConfig(vocab=64, width=32, mlp=64, layers=2, heads=4, kv_heads=2, head_dim=8), init="scratch",
)  # fmt: skip


T5 = dataclasses.replace(MODEL, llm=T5Config(64, 32, 64, 2, 2, 4, 8))


@pytest.mark.parametrize("model", [MODEL, T5], ids=["llama", "t5"])
def test_deviations_are_those_promised(model):
    params = vlm.init(model, 0)
    assert set(params) == set(vlm.shapes(model))
    assert float(np.std(params["llm/embed/embedding"])) == pytest.approx(1.0 if model is T5 else 0.02, rel=0.1)
    for path, x in params.items():
        std = standard_deviation(path, x.shape, model)
        if std is not None:
            assert float(np.std(x)) == pytest.approx(std, rel=0.1), path
        elif path.endswith("scale"):
            assert (np.asarray(x) == 1).all(), path
    assert float(np.std(params["tower/position"])) == pytest.approx(POSITION_STD, rel=0.1)


def test_patch_filters_do_not_see_flat_colour():
    kernel = np.asarray(vlm.init(MODEL, 0)["tower/patch/kernel"])
    flat = np.tile(np.float32([0.9, -0.3, 2.0]), 14 * 14)
    line = flat.copy()
    line[: 14 * 3] = 0
    assert np.abs(flat @ kernel).max() < 1e-4 < 1e-2 < np.abs(line @ kernel).max()


def test_seed_decides_and_stacked_layers_differ():
    one, same, other = (vlm.init(MODEL, seed)["llm/blocks/attn/q/kernel"] for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any() and (one[0] != one[1]).any()


def test_unknown_scheme_is_refused():
    with pytest.raises(ConfigError, match="model.init='zeros'"):
        dataclasses.replace(MODEL, init="zeros")
