"""Our model against transformers 5.23 on every HF checkpoint directory of goldens/llava_hf (reference.npz;
float32, 2e-4).
"""

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


class Golden:
    """A checkpoint, its reference, and one compiled forward pass that every test of the directory shares."""

    def __init__(self, directory: Path):
        self.checkpoint, self.model = open_golden(directory)
        with np.load(directory / "reference.npz") as file:
            self.want = dict(file)
        self.params = vlm.split(self.model)[1]
        rows, length = self.want["generated_ids"].shape
        length = max(length, self.want["single_generated_ids"].shape[1])
        self.shape = (rows, length, int(max(self.want["n_images_per_row"].max(), 1)))
        self.run = jax.jit(self._run)

    def _run(self, params: dict, batch: dict) -> jax.Array:
        model = vlm.build(self.checkpoint.config, params)
        return model.logits(vlm.forward(model, batch))

    def rows(self, ids: np.ndarray, mask: np.ndarray, counts) -> list[np.ndarray]:
        """Float32 logits [n, V] of the n unpadded slots of each row."""
        pixels = self.want["pixel_values"][: sum(counts)]
        batch = row_batch(self.checkpoint.config, self.checkpoint.image_token, ids, mask, pixels, counts, self.shape)
        got = np.asarray(self.run(self.params, batch))
        return [got[r][batch["segments"][r] == 1] for r in range(len(ids))]


golden = functools.lru_cache(maxsize=None)(Golden)


def each(test):
    """Once per checkpoint directory; where there is none the test is not collected."""
    mark = pytest.mark.parametrize("directory", DIRECTORIES, ids=[d.name for d in DIRECTORIES])
    return mark(test) if DIRECTORIES else None


@each
def test_batch(directory):
    case = golden(directory)
    want, mask = case.want, case.want["attention_mask"]
    got = case.rows(want["input_ids"], mask, want["n_images_per_row"])
    for r, row in enumerate(got):
        np.testing.assert_allclose(row, want["logits"][r][mask[r] == 1], atol=TOLERANCE, rtol=0)

    losses = []
    for r, row in enumerate(got):
        labels = want["labels"][r][mask[r] == 1][1:]
        log_p = np.asarray(jax.nn.log_softmax(row[:-1], axis=-1))
        losses.append(-log_p[np.arange(len(labels)), np.maximum(labels, 0)][labels != -100])
    np.testing.assert_allclose(np.concatenate(losses).mean(), want["loss"], atol=1e-4)


@each
def test_image_features(directory):
    case = golden(directory)
    images = case.want["pixel_values"].transpose(0, 2, 3, 1)[None]
    got = np.asarray(case.model.encode_images(images)).reshape(case.want["image_features"].shape)
    np.testing.assert_allclose(got, case.want["image_features"], atol=TOLERANCE, rtol=0)


@each
def test_single_row_and_text_only(directory):
    case = golden(directory)
    for name, counts in (("single", case.want["n_images_per_row"][:1]), ("text_only", [0])):
        ids = case.want[f"{name}_input_ids"]
        (got,) = case.rows(ids, np.ones_like(ids), counts)
        np.testing.assert_allclose(got, case.want[f"{name}_logits"][0], atol=TOLERANCE, rtol=0, err_msg=name)


@each
def test_generated_ids_are_the_greedy_ones(directory):
    """One pass over prompt + continuation: every new id is the argmax at the slot before it, up to the end of
    the row.

    Not for dynamic RoPE, whose cache keeps keys rotated with the frequencies of the step that wrote them.
    """
    case = golden(directory)
    want, counts = case.want, case.want["n_images_per_row"]
    if case.checkpoint.config.llm.rope.kind == "dynamic":
        pytest.skip("dynamic RoPE: only prefill logits are required")
    single = want["single_input_ids"]
    for prompt, generated, mask, images in (
        (want["input_ids"], want["generated_ids"], want["attention_mask"], counts),
        (single, want["single_generated_ids"], np.ones_like(single), counts[:1]),
    ):
        new = generated.shape[1] - prompt.shape[1]
        longer = np.concatenate([mask, np.ones((len(mask), new), mask.dtype)], 1)
        for row, ids in zip(case.rows(generated, longer, images), generated[:, -new:]):
            ended = np.flatnonzero(ids == case.checkpoint.tokens["eos_token_id"])
            length = ended[0] + 1 if len(ended) else new
            np.testing.assert_array_equal(row[-new - 1 : -1].argmax(-1)[:length], ids[:length])
