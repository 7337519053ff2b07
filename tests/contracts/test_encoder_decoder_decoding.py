"""Contract 7 for an encoder-decoder: an answer does not depend on batch, order, padding, mesh or cache."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.contracts.test_decoding import CONFIG as DECODER_ONLY
from tests.contracts.test_decoding import NEW, make_prompts
from tests.tiny_model import random_params
from vlm_jax.config import IMAGE, T5Config
from vlm_jax.generate import decode
from vlm_jax.generate.beam import beam_search
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.programs import programs
from vlm_jax.generate.rows import Prompt, PromptError, place
from vlm_jax.models import vlm
from vlm_jax.models.vlm import Compute
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig

LLM = T5Config(
    vocab=96, width=32, mlp=64, encoder_layers=2, decoder_layers=2, heads=4, head_dim=12, buckets=8, max_distance=16
)
CONFIG = dataclasses.replace(DECODER_ONLY, llm=LLM)
PROMPTS = [make_prompts()[i] for i in (0, 1, 2, 4)]  # no image, one, two, one with a long text
GREEDY, BEAMS = Decoding(NEW), Decoding(NEW, beams=3)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def alone(params):
    """The greedy answer of every prompt at batch size 1."""
    answers = Generator(CONFIG, params, batch_size=1).tokens(PROMPTS, GREEDY)
    assert len({tuple(a) for a in answers}) == len(answers) and all(len(set(a)) > 2 for a in answers)
    return answers


def test_cached_decoding_is_repeated_full_forward(params, alone):
    """Prompts behind each other in one row, apart by their segments, their answers too, and everything read again for every token."""
    placed, features = [place(p, CONFIG) for p in PROMPTS], CONFIG.vision.features
    row, pixels = {key: [] for key in ("tokens", "image_slots", "segments")}, []
    for number, one in enumerate(placed, start=1):
        row["tokens"] += one.tokens.tolist()
        row["image_slots"] += np.where(one.image_slots >= 0, one.image_slots + len(pixels) * features, -1).tolist()
        row["segments"] += [number] * len(one)
        pixels += [picture.views[0] for picture in one.prompt.images]
    batch = {key: np.asarray(x, np.int32)[None] for key, x in row.items()} | {"images": np.stack(pixels)[None]}
    batch["answer_segments"] = np.repeat(np.arange(1, len(PROMPTS) + 1, dtype=np.int32), NEW)[None]
    said = np.zeros((len(PROMPTS), NEW), np.int32)  # what the decoder reads: START, then its own words
    logits = jax.jit(lambda b: vlm.build(CONFIG, params).logits(vlm.forward(vlm.build(CONFIG, params), b)))
    for step in range(NEW):
        token = np.asarray(logits(batch | {"answer_tokens": said.reshape(1, -1)}))[0, step::NEW].argmax(-1)
        assert token.tolist() == [answer[step] for answer in alone]
        said[:, step + 1 : step + 2] = token[:, None]


@pytest.mark.parametrize("chosen, batch_size", [([3, 1, 0, 2], 8), ([2, 0, 1], 2), ([1, 3], 8)])
def test_batch_and_order_do_not_matter(params, alone, chosen, batch_size):
    together = Generator(CONFIG, params, batch_size=batch_size).tokens([PROMPTS[i] for i in chosen], GREEDY)
    assert together == [alone[i] for i in chosen]


def test_padding_and_a_cache_that_grows_do_not_matter(params, alone, monkeypatch):
    monkeypatch.setattr(decode, "PROMPT_BUCKET", 96)
    monkeypatch.setattr(decode, "NEW_BUCKET", 16)
    monkeypatch.setattr(decode, "FIRST_ROOM", 3)
    assert Generator(CONFIG, params).tokens(PROMPTS, GREEDY) == alone


def test_a_row_that_ends_does_not_stop_or_change_the_others(params, alone):
    eos = alone[2][3]
    answers = Generator(CONFIG, params, eos=(eos,)).tokens(PROMPTS, GREEDY)
    assert answers == [a[: a.index(eos) + 1] if eos in a else a for a in alone]
    assert len(answers[2]) <= 4 and max(map(len, answers)) == NEW


def test_beams_do_not_mix_prompts_and_one_beam_is_greedy(params, alone):
    generator, few = Generator(CONFIG, params), PROMPTS[1:4:2]
    assert beam_search(generator, [place(p, CONFIG) for p in few], GREEDY) == alone[1:4:2]
    together = generator.tokens(few, BEAMS)
    assert together == [generator.tokens([p], BEAMS)[0] for p in few] == generator.tokens(few[::-1], BEAMS)[::-1]


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 4, "seq": 2}])
def test_mesh_does_not_matter(params, alone, sizes):
    generator = Generator(CONFIG, params, mesh=make_mesh(MeshConfig(**sizes)))
    assert not generator.params["llm/decoder/blocks/cross/k/kernel"].sharding.is_fully_replicated
    assert generator.tokens(PROMPTS, GREEDY) == alone


def test_sampling_depends_on_prompt_and_seed_only(params):
    how, chosen, seeds = Decoding(NEW, temperature=1.2, top_k=40), PROMPTS[1:4:2], [5, 6]
    apart = Generator(CONFIG, params, batch_size=1).tokens(chosen, how, seeds)
    assert Generator(CONFIG, params).tokens(chosen[::-1], how, seeds[::-1])[::-1] == apart


def test_prompts_of_one_size_compile_once(params):
    """Text alone is not another program, nor is a shorter answer."""
    generator = Generator(CONFIG, params, batch_size=4, compute=Compute(remat="full"))
    generator.tokens(PROMPTS[1:4:2], GREEDY)
    generator.tokens([Prompt([7, IMAGE, 8, 9], PROMPTS[1].images), Prompt(range(3, 40))], Decoding(NEW - 3))
    made = programs(CONFIG, generator.compute, None)
    assert (made.prefill._cache_size(), made.decode._cache_size()) == (1, 1)


@pytest.mark.parametrize("prompt, words", [(Prompt([]), "empty"), (Prompt([1, 96]), "token id 96.*llm.vocab=96")])
def test_prompts_that_cannot_be_read(params, prompt, words):
    with pytest.raises(PromptError, match=f"prompt 1.*{words}"):
        Generator(CONFIG, params).tokens([Prompt([1]), prompt])
