"""Greedy continuations of HF LlavaForConditionalGeneration checkpoints, one row alone and several left-padded together."""

import numpy as np
import pytest

from tests.goldens import cases
from vlm_jax.config import IMAGE
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.load import eos_of, place_all
from vlm_jax.generate.rows import Picture, Prompt

CASES = [path for path in cases("llava_hf", "*/reference.npz") if "generated_ids" in np.load(path).files]


def prompt_of(ids, image_token, features, pixels):
    """HF ids with every image expanded -> a Prompt with one IMAGE per image."""
    tokens, rest = [], list(map(int, ids))
    while rest:
        tokens.append(IMAGE if rest[0] == image_token else rest[0])
        rest = rest[features if rest[0] == image_token else 1 :]
    pictures = [Picture(x.transpose(1, 2, 0)[None], (x.shape[2], x.shape[1])) for x in pixels]
    return Prompt(tokens, pictures)


@pytest.fixture(scope="module", params=CASES, ids=lambda p: p.parent.name)
def case(request):
    z, checkpoint = np.load(request.param), open_checkpoint(request.param.parent)
    generator = Generator(checkpoint.config, place_all(checkpoint, np.float32, None), eos=eos_of(checkpoint))
    ends = np.cumsum(z["n_images_per_row"])
    prompts = [
        prompt_of(
            ids[mask == 1], checkpoint.image_token, checkpoint.config.vision.features, z["pixel_values"][end - n : end]
        )
        for ids, mask, n, end in zip(z["input_ids"], z["attention_mask"], z["n_images_per_row"], ends)
    ]
    return z, checkpoint, generator, prompts


def agree(answers, recorded, generator, config):
    """New tokens up to EOS, padding behind. With dynamic rope only the first is asked for: HF's later ones depend on the whole batch."""
    for answer, row in zip(answers, recorded):
        if config.llm.rope.kind == "dynamic":
            assert answer[0] == row[0]
            continue
        assert answer == row[: len(answer)].tolist()
        assert len(answer) == len(row) or answer[-1] in generator.eos


def test_batch(case):
    z, checkpoint, generator, prompts = case
    new = z["generated_ids"][:, z["input_ids"].shape[1] :]
    agree(generator.tokens(prompts, Decoding(new.shape[1])), new, generator, checkpoint.config)


def test_single(case):
    z, checkpoint, generator, prompts = case
    new = z["single_generated_ids"][:, z["single_input_ids"].shape[1] :]
    agree(generator.tokens(prompts[:1], Decoding(new.shape[1])), new, generator, checkpoint.config)
