"""The encoder-decoder against linzhiqiu/CLIP-FlanT5: features, splicing, hidden states, logits, loss and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_t5
from vlm_jax.convert import names
from vlm_jax.models import vlm
from vlm_jax.train.options import STAGE2, TrainConfig
from vlm_jax.train.state import select
from vlm_jax.train.step import loss_and_gradients

CASES = golden_t5.files_with("in/input_ids", "out/logits")
CONFIG = TrainConfig(dtype="float32", vision_dtype="float32", frozen_dtype="float32", remat="full", loss_chunk=8)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[1].stem)
def case(request):
    name, path = request.param
    return np.load(path), *golden_t5.load(name)


def in_order(rows: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """What lies in the real slots, row after row."""
    return np.asarray(rows)[segments > 0]


def test_features_and_splicing(case):
    z, config, params = case
    model, batch = vlm.build(config, params), golden_t5.row_batch(config, z)
    features = model.tower(jnp.asarray(z["in/images"].transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(features, z["out/image_features_selected"], atol=5e-5)
    np.testing.assert_allclose(model.projector(features), z["out/image_features_projected"], atol=5e-5)
    np.testing.assert_array_equal(batch["segments"] > 0, z["out/attention_mask_expanded"])
    np.testing.assert_array_equal(
        in_order(batch["answer_tokens"], batch["answer_segments"]),
        z["out/decoder_input_ids"][z["in/decoder_attention_mask"] == 1],
    )
    wanted = z["out/inputs_embeds"] if "out/inputs_embeds" in z.files else z["out/encoder_hidden_states"][0]
    real = batch["segments"] > 0
    np.testing.assert_allclose(np.asarray(model.inputs(batch))[real], wanted[real], atol=5e-5)


@pytest.mark.parametrize("together", [False, True], ids=["rows", "packed"])
def test_hidden_states_and_logits(case, together):
    """In one row with all the others a sample gives what it gives alone."""
    z, config, params = case
    batch = golden_t5.row_batch(config, z, together)

    @jax.jit
    def run(params, batch):
        model = vlm.build(config, params)
        return model.encode(batch), model.logits(vlm.forward(model, batch))

    memory, logits = run(params, batch)
    wanted = z["out/encoder_last_hidden_state"][z["out/attention_mask_expanded"] == 1]
    np.testing.assert_allclose(in_order(memory, batch["segments"]), wanted, atol=5e-5)
    real = z["in/decoder_attention_mask"] == 1
    np.testing.assert_allclose(in_order(logits, batch["answer_segments"]), z["out/logits"][real], atol=2e-4)


@pytest.mark.parametrize("together", [False, True], ids=["rows", "packed"])
def test_loss_and_gradients(case, together):
    z, config, params = case
    chosen = select(STAGE2, vlm.shapes(config))
    trainable = {path: jnp.asarray(params[path]) for path in chosen}
    frozen = {path: jnp.asarray(value) for path, value in params.items() if path not in chosen}
    batch = {key: value[None] for key, value in golden_t5.row_batch(config, z, together).items()}
    grads, sums = jax.jit(lambda t, f, b: loss_and_gradients(config, CONFIG, t, f, b))(trainable, frozen, batch)
    np.testing.assert_allclose(sums["loss"], z["out/loss"], atol=1e-5)
    total = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    np.testing.assert_allclose(total, z["out/grad_global_norm"], rtol=1e-3)
    theirs = in_their_layout(config, grads)
    for key in z.files:
        kind, _, name = key.partition("/")
        if kind == "gradnorm":
            np.testing.assert_allclose(np.linalg.norm(theirs[name]), z[key], rtol=1e-3, atol=1e-7, err_msg=name)
        elif kind == "grad":
            np.testing.assert_allclose(theirs[name], z[key], atol=1e-5, rtol=1e-3, err_msg=name)


def in_their_layout(config, values):
    """{"our path": array} -> {"original name": tensor}."""
    out = {}
    for entry in names.entries(config):
        if entry.path in values:
            value = np.asarray(values[entry.path])
            value = value if entry.layer is None else value[entry.layer]
            out[names.key_of(entry, "clip_t5", config.projector.kind)] = entry.layout.write(value, entry.shape)
    return out


def test_every_tensor_of_the_originals_has_a_name():
    """Nothing of a recorded model is left out, and its aliases are those that are known."""
    for name, path in golden_t5.models().items():
        config, params = golden_t5.load(name)
        assert set(params) == set(vlm.shapes(config))
        written = {names.key_of(entry, "clip_t5", config.projector.kind) for entry in names.entries(config)}
        there = {key[2:] for key in np.load(path).files if key.startswith("w/")}
        assert written == {key for key in there if not re.fullmatch("|".join(names.ALIASES), key)}
