"""T5 and FLAN-T5 directories against transformers: bias tables, encoder, logits, loss, greedy and beam search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens import cases
from vlm_jax.config import VisionConfig, VLMConfig
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.rows import Prompt
from vlm_jax.models import vlm
from vlm_jax.nn.relative_position import diagonals, toeplitz

CASES = [
    path for path in cases("clip_flant5", "*_io.npz") if (path.parent / path.name.removesuffix("_io.npz")).is_dir()
]
TOWER = VisionConfig(image_size=8, patch_size=4, width=8, layers=1, heads=1, mlp=8, feature_layers=(-1,))


@functools.cache
def opened(path):
    """(recorded, config, params): the T5 of the directory beside `path`, with a tower that no text uses."""
    checkpoint = open_checkpoint(path.parent / path.name.removesuffix("_io.npz"), partial=True)
    config = VLMConfig(vision=TOWER, llm=checkpoint.config.llm)
    shapes = vlm.shapes(config)
    params = {name: np.zeros(like.shape, np.float32) for name, like in shapes.items() if not name.startswith("llm/")}
    params |= {name: leaf.read() for name, leaf in checkpoint.leaves.items() if name.startswith("llm/")}
    return np.load(path), config, {name: jnp.asarray(value) for name, value in params.items()}


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request):
    return opened(request.param)


def test_bias_of_the_first_layers(case):
    z, config, params = case
    for side, both in (("encoder", True), ("decoder", False)):
        wanted = z[f"{side}_bias_layer0"]
        n, table = wanted.shape[-1], params[f"llm/{side}/relative"]
        values = diagonals(table, n, n, bidirectional=both, max_distance=config.llm.max_distance)
        np.testing.assert_array_equal(toeplitz(values, n, n)[:, [0, n // 2, n - 1]], wanted)


def test_encoder_logits_and_loss(case):
    z, config, params = case
    labels, real = z["labels"], z["decoder_attention_mask"] == 1
    read = np.concatenate([np.zeros((len(labels), 1), int), np.where(labels == -100, 0, labels)[:, :-1]], 1)
    batch = {"tokens": z["input_ids"], "segments": z["attention_mask"]}
    batch |= {"answer_tokens": read, "answer_segments": z["decoder_attention_mask"]}

    @jax.jit
    def run(params, batch):
        model = vlm.build(config, params)
        return model.encode(batch), model.logits(vlm.forward(model, batch))

    memory, logits = run(params, batch)
    real_rows = z["attention_mask"][0] == 1
    np.testing.assert_allclose(
        np.asarray(memory)[0][real_rows], z["encoder_last_hidden_state"][0][real_rows], atol=5e-5
    )
    np.testing.assert_allclose(np.asarray(logits)[real], z["logits"][real], atol=2e-4)
    chances = jax.nn.log_softmax(logits, axis=-1)
    losses = -np.take_along_axis(np.asarray(chances), np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses[labels != -100].mean(), z["loss"], atol=1e-4)


@pytest.mark.parametrize("key, beams", [("gen_output_ids", 1), ("beam3_output_ids", 3)])
def test_generated_ids(case, key, beams):
    """Recorded rows begin with the start token and are padded with 0 behind the EOS."""
    z, config, params = case
    rows = [ids[kept == 1].tolist() for ids, kept in zip(z["gen_input_ids"], z["gen_attention_mask"])]
    new = (int(z["gen_max_length"]) if beams == 1 else z[key].shape[1]) - 1
    answers = Generator(config, params, eos=(1,)).tokens(list(map(Prompt, rows)), Decoding(new, beams=beams))
    for answer, row in zip(answers, z[key].tolist(), strict=True):
        assert answer == row[1 : 1 + len(answer)]
        assert not any(row[1 + len(answer) :])
