"""The decoder over a few answer slots against the whole decoder: padding, samples of their own, ties, adapters."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.tiny_model import random_params
from vlm_jax.config import LoRAConfig, T5Config, VisionConfig, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.models.t5_short import decode_short

LLM = T5Config(
    vocab=64, width=32, mlp=64, encoder_layers=1, decoder_layers=3, heads=4, head_dim=12, buckets=8, max_distance=16
)
FLAN = VLMConfig(
    VisionConfig(image_size=8, patch_size=4, width=8, layers=1, heads=1, mlp=8, feature_layers=(-1,)), llm=LLM
)
MODELS = {
    "flan": FLAN,
    "original": dataclasses.replace(FLAN, llm=dataclasses.replace(LLM, gated=False, act="relu", tie=True)),
    "lora": dataclasses.replace(FLAN, lora=(LoRAConfig(("^llm/decoder/blocks/cross",), 2),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_whole_decoder(name):
    config = MODELS[name]
    params = random_params(config)
    rng, U, T = np.random.default_rng(0), 5, 24
    tokens, memory = rng.integers(2, 64, (3, U)), rng.normal(size=(3, T, 32)).astype(np.float32)
    segments, shown = np.ones((3, U), int), np.ones((3, T), int)
    segments[1, 3:], shown[0, :10] = 0, 0  # a shorter answer; a shorter row, padded in front
    segments[2, 2:], shown[2, 14:] = 2, 2  # two samples in a row

    @jax.jit
    def both(params):
        llm = vlm.build(config, params).llm
        rows = tokens, segments, memory, shown
        return decode_short(llm, *rows), llm.decode(*rows)

    ours, wanted = both(params)
    np.testing.assert_allclose(ours[segments > 0], wanted[segments > 0], atol=2e-5)
    assert np.abs(wanted[2, 2:] - wanted[1, 2:]).max() > 0.1
