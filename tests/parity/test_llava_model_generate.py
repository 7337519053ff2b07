"""Greedy and beam-search continuations, and the logits of the spliced prompt, against haotian-liu/LLaVA."""

import json
import re

import jax
import numpy as np
import pytest

from tests.golden_model import assign_images, load
from tests.goldens import cases
from vlm_jax.generate.decode import Decoding, Generator
from vlm_jax.generate.rows import Picture, Prompt, batch_of, place
from vlm_jax.models import vlm

CASES = cases("llava_model", "case_generate*.npz")
SEARCHES = [(path, key) for path in CASES for key in np.load(path).files if key.endswith("_output_ids")]


def read(path):
    """(file, config, params, EOS ids, one Prompt per row)."""
    z = np.load(path)
    config, params = load(path.parent, z)
    eos = json.loads((path.parent / "config.json").read_text())["llm_config"]["eos_token_id"]
    ids = z["input_ids"]
    keep = z["attention_mask"].astype(bool) if "attention_mask" in z.files else np.ones(ids.shape, bool)
    views, sizes = assign_images(ids, keep, z["images"])
    prompts = []
    for row, kept, stacks, pixels in zip(ids, keep, views, sizes):
        pictures = [Picture(stack.transpose(0, 2, 3, 1), size) for stack, size in zip(stacks, pixels)]
        prompts.append(Prompt(row[kept].tolist(), pictures))
    return z, config, params, (eos,), prompts


@pytest.mark.parametrize("path, key", SEARCHES, ids=lambda x: getattr(x, "stem", x))
def test_continuation(path, key):
    """Recorded rows are a BOS placeholder, the new tokens, and padding where EOS ended a row before the others."""
    z, config, params, eos, prompts = read(path)
    wanted = [row[1:] for row in z[key]]
    beams = int((re.match(r"beam(\d+)_", key) or ["", 1])[1])
    longest = max(z[k].shape[1] for k in z.files if k.endswith("_output_ids")) - 1
    room = longest if all(set(eos) & set(row.tolist()) for row in wanted) else len(wanted[0])
    answers = Generator(config, params, eos=eos).tokens(prompts, Decoding(room, beams=beams))
    for answer, row in zip(answers, wanted):
        assert answer == row[: len(answer)].tolist()
        assert len(answer) == len(row) or answer[-1] in eos


@pytest.mark.parametrize("path", [p for p in CASES if "prompt_logits" in np.load(p).files], ids=lambda p: p.stem)
def test_prompt_logits(path):
    z, config, params, _, prompts = read(path)
    placed = [place(prompt, config) for prompt in prompts]
    slots = max(map(len, placed))
    batch = batch_of(placed, config, len(placed), slots, max(p.prompt.views for p in placed))
    logits = jax.jit(lambda p, b: vlm.build(config, p).logits(vlm.forward(vlm.build(config, p), b)))(params, batch)
    for ours, theirs, one in zip(np.asarray(logits), z["prompt_logits"], placed):
        np.testing.assert_allclose(ours[slots - len(one) :], theirs[-len(one) :], atol=2e-4)
