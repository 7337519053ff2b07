"""Every published recipe shards its parameters as committed in tests/shardings, and its moments like them; nothing is compiled."""

import jax
import pytest

from tests.sharding_dumps import NAMES, dump, file_of, state_of

LIKE_OTHERS = (
    "llava15:13b,stage2",
    *(f"visual_tokenizer:{kind}" for kind in ("vq16", "vq8", "rq", "hq", "hq3", "unicode_rq")),
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LIKE_OTHERS else n for n in NAMES])
def test_shardings_are_those_that_were_committed(name):
    file = file_of(name)
    committed = file.read_text().splitlines() if file.exists() else []
    now = dump(name).splitlines()
    changed = [f"- {x}" for x in committed if x not in set(now)] + [f"+ {x}" for x in now if x not in set(committed)]
    assert now == committed, (
        f"{file.name} is not how {name} is sharded now; if that is meant, run `python -m tests.sharding_dumps` and commit:\n"
        + "\n".join(changed[:20])
    )


@pytest.mark.parametrize(
    "name",
    [
        "llava15:7b,stage2",
        "llava15:7b,stage2,qlora",
        "clip_flant5:xl,stage2",
        "visual_tokenizer:vq16",
        "prior:gpt_b,c2i",
    ],
)
def test_moments_and_averages_are_laid_out_like_their_parameters(name):
    state, seen = state_of(name), 0
    for path, like in jax.tree_util.tree_leaves_with_path((state.opt_state, state.moving)):
        key = getattr(path[-1], "key", "")
        parameter = state.trainable.get(str(key).removeprefix("average/"))
        if parameter is not None and like.shape == parameter.shape:
            assert like.sharding.is_equivalent_to(parameter.sharding, like.ndim), jax.tree_util.keystr(path)
            seen += 1
    assert seen >= 2 * len(state.trainable)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_large_is_whole_on_every_chip(name):
    """But VGG-16 and statistics; 8 MB is what a 13B model may repeat."""
    lines = [x for x in file_of(name).read_text().splitlines()[1:] if not x.startswith("frozen lpips/")]
    for one in lines:
        kind, shape, axes = one.partition("  ")[0], one.split("[")[1].split("]")[0], one.rpartition("  ")[2]
        size = 1
        for n in shape.split(",") if shape else ():
            size *= int(n)
        assert size < 2**21 or set(axes) - set("-, "), f"{kind} [{shape}] is not divided"
