"""Our model against transformers 5.23 on every HF checkpoint directory of goldens/llava_hf (reference.npz; float32, 2e-4)."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.golden_hf import open_golden, row_batch
from tests.goldens import cases
from vlm_jax.models import vlm

DIRECTORIES = [path.parent for path in cases("llava_hf", "*/reference.npz")]
TOLERANCE = 2e-4
pytestmark = pytest.mark.parity


@functools.lru_cache(maxsize=1)
def golden(directory: Path):
    checkpoint, model = open_golden(directory)
    with np.load(directory / "reference.npz") as file:
        return checkpoint, model, dict(file)


def logits(checkpoint, model, batch: dict) -> np.ndarray:
    """Float32 logits [B, T, V] in one program, the model rebuilt inside from its flat parameters."""
    params = vlm.split(model)[1]

    @jax.jit
    def run(params: dict, batch: dict) -> jax.Array:
        rebuilt = vlm.build(checkpoint.config, params)
        return rebuilt.logits(vlm.forward(rebuilt, batch))

    return np.asarray(run(params, batch))


def each(test):
    return pytest.mark.parametrize("directory", DIRECTORIES, ids=[d.name for d in DIRECTORIES])(test)


@each
def test_batch(directory):
    checkpoint, model, want = golden(directory)
    mask = want["attention_mask"]
    pixels, counts = want["pixel_values"], want["n_images_per_row"]
    batch = row_batch(checkpoint.config, checkpoint.image_token, want["input_ids"], mask, pixels, counts)
    got = logits(checkpoint, model, batch)
    real, ours = mask == 1, batch["segments"] == 1
    np.testing.assert_allclose(got[ours], want["logits"][real], atol=TOLERANCE, rtol=0)

    images = pixels.transpose(0, 2, 3, 1)[None]
    features = np.asarray(model.encode_images(images)).reshape(want["image_features"].shape)
    np.testing.assert_allclose(features, want["image_features"], atol=TOLERANCE, rtol=0)

    labels = np.where(real, want["labels"], -100)[:, 1:]
    taken = want["logits"].astype(np.float64)[:, :-1]
    taken[real[:, :-1]] = got[ours].astype(np.float64)[_all_but_last(real)]
    log_p = taken - np.log(np.exp(taken).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0][labels != -100].mean()
    np.testing.assert_allclose(loss, want["loss"], atol=1e-4)


def _all_but_last(real: np.ndarray) -> np.ndarray:
    """Among the real positions in order, those that are not in the last column."""
    columns = np.broadcast_to(np.arange(real.shape[1]), real.shape)[real]
    return columns < real.shape[1] - 1


@each
def test_single_row_and_text_only(directory):
    checkpoint, model, want = golden(directory)
    ids, count = want["single_input_ids"], want["n_images_per_row"][:1]
    batch = row_batch(checkpoint.config, checkpoint.image_token, ids, np.ones_like(ids), want["pixel_values"][: count[0]], count)
    np.testing.assert_allclose(logits(checkpoint, model, batch), want["single_logits"], atol=TOLERANCE, rtol=0)
    ids = want["text_only_input_ids"]
    batch = row_batch(checkpoint.config, checkpoint.image_token, ids, np.ones_like(ids), None, [0])
    np.testing.assert_allclose(logits(checkpoint, model, batch), want["text_only_logits"], atol=TOLERANCE, rtol=0)


@each
def test_generated_ids_are_the_greedy_ones(directory):
    """One pass over prompt + continuation: every new id is the argmax at the slot before it, up to the end of the row.

    Not for dynamic RoPE, whose cache keeps keys rotated with the frequencies of the step that wrote them.
    """
    checkpoint, model, want = golden(directory)
    if checkpoint.config.llm.rope.kind == "dynamic":
        pytest.skip("dynamic RoPE: only prefill logits are required")
    for prompt, generated, mask, counts in (
        (want["input_ids"], want["generated_ids"], want["attention_mask"], want["n_images_per_row"]),
        (want["single_input_ids"], want["single_generated_ids"], np.ones_like(want["single_input_ids"]), want["n_images_per_row"][:1]),
    ):
        new = generated.shape[1] - prompt.shape[1]
        longer = np.concatenate([mask, np.ones((len(mask), new), mask.dtype)], 1)
        pixels = want["pixel_values"][: sum(counts)]
        batch = row_batch(checkpoint.config, checkpoint.image_token, generated, longer, pixels, counts)
        best = logits(checkpoint, model, batch)[:, -new - 1 : -1].argmax(-1)
        for row, continuation in zip(best, generated[:, -new:]):
            ended = np.flatnonzero(continuation == checkpoint.tokens["eos_token_id"])
            length = ended[0] + 1 if len(ended) else new
            np.testing.assert_array_equal(row[:length], continuation[:length])
