"""Contract 7: what a prompt is answered does not depend on its batch, the order, the padding, the mesh or the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_model import random_params
from vlm_jax.config import IMAGE, LLMConfig, RopeConfig, VisionConfig, VLMConfig
from vlm_jax.generate import decode
from vlm_jax.generate.beam import beam_search
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.programs import programs
from vlm_jax.generate.rows import Picture, Prompt, PromptError, batch_of, bucket, place
from vlm_jax.models import vlm
from vlm_jax.models.vlm import Compute
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.parallel.mesh_config import MeshConfig

CONFIG = VLMConfig(
    vision=VisionConfig(image_size=12, patch_size=4, width=16, layers=2, heads=2, mlp=32),
    llm=LLMConfig(vocab=96, width=32, mlp=64, layers=2, heads=4, kv_heads=2, head_dim=8, max_position=256),
)
NEW = 10


@jax.jit
def plain_logits(params, batch):
    """A plain forward pass, no cache: [B, T, V]."""
    model = vlm.build(CONFIG, params)
    return model.logits(vlm.forward(model, batch))


class Words:
    """Ids as words: the tokenizer of these tests."""

    eos_id = None

    def decode(self, ids, skip_special=True):
        return " ".join(f"w{i}" for i in ids)


def picture(rng):
    return Picture(rng.integers(0, 256, (1, 12, 12, 3), np.uint8), (12, 12))


def make_prompts():
    """Six prompts with 0, 1, 2, 3, 1 and 0 images, of different lengths."""
    rng, prompts = np.random.default_rng(0), []
    for count, words in ((0, 1), (1, 4), (2, 9), (3, 5), (1, 30), (0, 22)):
        tokens = rng.integers(3, CONFIG.llm.vocab, words + count)
        tokens[rng.permutation(words + count)[:count]] = IMAGE
        prompts.append(Prompt(tokens.tolist(), tuple(picture(rng) for _ in range(count))))
    return prompts


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def alone(params):
    """The greedy answer of every prompt at batch size 1."""
    one = Generator(CONFIG, params, batch_size=1)
    answers = one.tokens(PROMPTS, Decoding(NEW))
    # they must differ to test anything
    assert len({tuple(a) for a in answers}) == len(answers) and all(len(set(a)) > 2 for a in answers)
    return answers


def test_cached_decoding_is_repeated_full_forward(params, alone):
    """Right-padded rows without a cache, the whole text read again for every token."""
    slots = 64
    batch = batch_of([place(p, CONFIG) for p in PROMPTS], CONFIG, len(PROMPTS), slots, 4)
    starts = (batch["segments"] == 0).sum(axis=1)
    text = {k: np.stack([np.roll(row, -n) for row, n in zip(x, starts)]) for k, x in batch.items() if k != "images"}
    text["images"] = batch["images"]
    rows = np.arange(len(PROMPTS))
    for step in range(NEW):
        ends = text["segments"].sum(axis=1)
        token = np.asarray(plain_logits(params, text))[rows, ends - 1].argmax(-1)
        assert token.tolist() == [answer[step] for answer in alone]
        text["tokens"][rows, ends], text["segments"][rows, ends], text["positions"][rows, ends] = token, 1, ends


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(len(PROMPTS))),
    count=st.integers(1, len(PROMPTS)),
    batch_size=st.sampled_from([2, 4, 8]),
)
def test_batch_and_order_do_not_matter(params, alone, order, count, batch_size):
    chosen = order[:count]
    together = Generator(CONFIG, params, batch_size=batch_size).tokens([PROMPTS[i] for i in chosen], Decoding(NEW))
    assert together == [alone[i] for i in chosen]


def test_padding_does_not_matter(params, alone, monkeypatch):
    monkeypatch.setattr(decode, "PROMPT_BUCKET", 192)
    monkeypatch.setattr(decode, "NEW_BUCKET", 64)
    assert Generator(CONFIG, params).tokens(PROMPTS, Decoding(NEW)) == alone


def test_a_cache_that_grows_does_not_matter(params, alone, monkeypatch):
    monkeypatch.setattr(decode, "FIRST_ROOM", 3)
    assert Generator(CONFIG, params).tokens(PROMPTS, Decoding(NEW)) == alone


def test_packed_prompts_continue_as_padded_ones(params, alone):
    """Prompts behind each other in one row, apart by their segments alone: the first token of each answer."""
    placed = [place(p, CONFIG) for p in PROMPTS]
    P = CONFIG.vision.features
    views, row = 8, {k: [] for k in ("tokens", "image_slots", "segments", "positions")}
    pixels, ends = [], []
    for number, one in enumerate(placed, start=1):
        row["tokens"] += one.tokens.tolist()
        row["image_slots"] += np.where(one.image_slots >= 0, one.image_slots + len(pixels) * P, -1).tolist()
        row["segments"] += [number] * len(one)
        row["positions"] += range(len(one))
        pixels += [x.views[0] for x in one.prompt.images]
        ends.append(len(row["tokens"]) - 1)
    batch = {k: jnp.asarray(x, jnp.int32)[None] for k, x in row.items()}
    batch["images"] = jnp.asarray(np.stack(pixels + [np.zeros_like(pixels[0])] * (views - len(pixels))))[None]
    logits = plain_logits(params, batch)[0]
    assert [int(logits[end].argmax()) for end in ends] == [answer[0] for answer in alone]


def test_sampling_depends_on_prompt_and_seed_only(params):
    how, prompts, seeds = (
        Decoding(NEW, temperature=1.2, top_k=40, top_p=0.95),
        [PROMPTS[i] for i in (0, 1, 4)],
        [5, 6, 7],
    )
    apart = Generator(CONFIG, params, batch_size=1).tokens(prompts, how, seeds)
    together = Generator(CONFIG, params).tokens(prompts[::-1], how, seeds[::-1])[::-1]
    assert together == apart
    again = Generator(CONFIG, params).tokens([PROMPTS[0]] * 3, how, [1, 2, 1])
    assert again[0] == again[2] != again[1]


def test_a_row_that_ends_does_not_stop_or_change_the_others(params, alone):
    """Every row is cut at the EOS; what comes before is unchanged."""
    eos = alone[2][3]
    answers = Generator(CONFIG, params, eos=(eos,)).tokens(PROMPTS, Decoding(NEW))
    assert answers == [a[: a.index(eos) + 1] if eos in a else a for a in alone]
    assert len(answers[2]) <= 4 and max(map(len, answers)) == NEW


def test_stop_strings_and_streams_end_where_the_text_does(params, alone):
    generator = Generator(CONFIG, params, Words())
    texts = [Words().decode(a) for a in alone]
    assert generator.text(PROMPTS, Decoding(NEW)) == texts
    stop = f"w{alone[2][5]} w{alone[2][6]}"
    assert generator.text(PROMPTS, Decoding(NEW, stop=(stop,))) == [t.split(stop)[0].strip() for t in texts]
    for prompt, text in ((PROMPTS[2], texts[2]), (PROMPTS[5], texts[5])):
        pieces = list(generator.stream(prompt, Decoding(NEW, stop=(stop,))))
        assert "".join(pieces) == text.split(stop)[0].strip() and len(pieces) > 1


def test_repetition_penalty_forbids_repeats_when_large(params):
    for answer in Generator(CONFIG, params).tokens(PROMPTS, Decoding(NEW, repetition_penalty=1e6)):
        assert len(set(answer)) == len(answer)


def test_beam_of_one_is_greedy_and_wider_ones_do_not_mix_prompts(params, alone):
    generator = Generator(CONFIG, params)
    how = Decoding(NEW)
    assert beam_search(generator, [place(p, CONFIG) for p in PROMPTS], how) == alone
    wide, few = Decoding(NEW, beams=4), [PROMPTS[i] for i in (0, 1, 4)]
    assert generator.tokens(few, wide) == [generator.tokens([p], wide)[0] for p in few]


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 4, "seq": 2}]
)
def test_mesh_does_not_matter(params, alone, sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    generator = Generator(CONFIG, params, mesh=mesh)
    shared = generator.params["llm/blocks/mlp/gate/kernel"].sharding
    assert not shared.is_fully_replicated
    assert generator.tokens(PROMPTS, Decoding(NEW)) == alone


def test_dynamic_rope_is_not_stretched_by_the_neighbours(params):
    """Its angles follow the longest row of a batch once that is over max_position, so such rows run alone."""
    rope = RopeConfig(kind="dynamic", factor=4.0)
    config = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, rope=rope, max_position=32))
    together = Generator(config, params).tokens(PROMPTS[:3], Decoding(NEW))
    assert together == [Generator(config, params).tokens([p], Decoding(NEW))[0] for p in PROMPTS[:3]]


def test_prompts_of_one_size_compile_once(params):
    generator, mixed = Generator(CONFIG, params, batch_size=4, compute=Compute(remat="full")), [PROMPTS[1], PROMPTS[4]]
    generator.tokens(mixed, Decoding(NEW))
    other = [Prompt([7, IMAGE, 8, 9], [picture(np.random.default_rng(5))]), Prompt(range(3, 40))]
    generator.tokens(other, Decoding(NEW - 3))
    made = programs(CONFIG, generator.compute, None)
    assert (made.prefill._cache_size(), made.decode._cache_size()) == (1, 1)


def test_few_sizes():
    sizes = {bucket(n, 64) for n in range(1, 4097)}
    assert len(sizes) == 13 and all(bucket(n, 64) >= n for n in range(1, 4097)) and max(sizes) == 4096


@pytest.mark.parametrize(
    "prompt, words",
    [
        (Prompt([]), "empty"),
        (Prompt([1, IMAGE]), "1 image placeholders but 0 images"),
        (Prompt([1, 96]), "token id 96.*llm.vocab=96"),
        (Prompt([IMAGE], [Picture(np.zeros((1, 8, 8, 3), np.uint8))]), "shape"),
    ],
)
def test_prompts_that_cannot_be_read(params, prompt, words):
    with pytest.raises(PromptError, match=f"prompt 1.*{words}"):
        Generator(CONFIG, params).tokens([Prompt([1]), prompt])
