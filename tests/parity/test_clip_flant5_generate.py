"""Greedy answers of CLIP-FlanT5, batched and alone, through the generator that every model has."""

import json

import jax
import numpy as np
import pytest

from tests import golden_t5
from tests.goldens import beside, golden
from vlm_jax.config import IMAGE
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.rows import Picture, Prompt
from vlm_jax.models import vlm


@golden(golden_t5.FOLDER, "generate_*.json")
def test_greedy_answers(path):
    """Recorded rows begin with the start token and end at max_length or behind the EOS."""
    wanted = json.loads(path.read_text(encoding="utf-8"))
    name = wanted["weights"].removesuffix("_weights.npz")
    config, params = golden_t5.load(name)
    pixels = np.load(beside(path, f"vqascore_{name}.npz"))["out/pixel_values_pad"].transpose(0, 2, 3, 1)
    size = (config.vision.image_size,) * 2
    prompts, image = [], 0
    for ids in wanted["input_ids"]:
        n = ids.count(IMAGE)
        prompts.append(Prompt(ids, [Picture(view[None], size) for view in pixels[image : image + n]]))
        image += n
    generator = Generator(config, params, eos=(1,))
    for key, batches in (("output_ids", [prompts]), ("output_ids_unbatched", [[prompt] for prompt in prompts])):
        answers = [answer for batch in batches for answer in generator.tokens(batch, Decoding(len(wanted[key][0]) - 1))]
        for answer, row in zip(answers, wanted[key], strict=True):
            assert answer == row[1 : 1 + len(answer)]
            assert len(answer) == len(row) - 1 or answer[-1] == 1


@pytest.mark.parametrize("name", sorted(golden_t5.models()))
def test_cache_grows_and_gives_what_the_whole_answer_gives(name):
    """More tokens than the cache first has room for, each of them the likeliest after those before it."""
    config, params = golden_t5.load(name)
    answer = Generator(config, params, eos=()).tokens([Prompt([5, 6, 7, 1])], Decoding(80))[0]
    batch = {"tokens": np.array([[5, 6, 7, 1]]), "segments": np.ones((1, 4), int)}
    batch |= {"answer_tokens": np.array([[0, *answer[:-1]]]), "answer_segments": np.ones((1, 80), int)}
    model = vlm.build(config, params)
    logits = jax.jit(lambda batch: model.logits(vlm.forward(model, batch)))(batch)
    assert np.argmax(logits[0], -1).tolist() == answer
