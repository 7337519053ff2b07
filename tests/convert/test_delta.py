"""Delta weights on whole directories: made, applied again, refused as a model, and refused on another base."""

from __future__ import annotations

import numpy as np
import pytest

from tests.convert.models import TINY, llm_directory, random_params, random_tensors, with_llm, write_tensors
from vlm_jax.convert.command import convert
from vlm_jax.convert.files import write_json
from vlm_jax.convert.hf_config import llm_to_hf
from vlm_jax.convert.manifest import FILE, read_manifest
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.shards import read_directory
from vlm_jax.convert.tensors import CheckpointError, full
from vlm_jax.convert.write import export


def run(**flags):
    return convert(**{"from" if name == "source" else name: str(value) for name, value in flags.items()})


@pytest.fixture
def target(tmp_path):
    """A LLaVA model with ten rows more than its base, a Llama of 94 rows."""
    llm_directory(tmp_path / "base", with_llm(vocab=94))
    export(tmp_path / "target", TINY, random_params(TINY), names="llava", chat_template="hello")
    return tmp_path / "target"


@pytest.mark.parametrize("dtype", ["", "float32", "bfloat16"])
def test_there_and_back(tmp_path, target, dtype, capsys):
    assert run(source=target, base=tmp_path / "base", delta="make", to=tmp_path / "delta", dtype=dtype) == 0
    made = read_directory(tmp_path / "delta")
    assert {str(t.dtype) for t in made.values()} == {dtype or "float16"}
    assert read_manifest(tmp_path / "delta").kind == "delta"
    with pytest.raises(CheckpointError, match="delta holds delta weights: add them to their base with convert --delta"):
        open_checkpoint(tmp_path / "delta")
    flags = {"delta": "apply", "to": tmp_path / "again", "max_shard": "20KB", "dtype": "float32"}
    assert run(source=tmp_path / "delta", base=tmp_path / "base", **flags) == 0
    assert "M parameters" in capsys.readouterr().out
    again, before = open_checkpoint(tmp_path / "again"), open_checkpoint(target)
    assert again.config == before.config and again.raw["torch_dtype"] == "float32"
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "hello"
    exact = {"": 2e-3, "float32": 1e-6, "bfloat16": 3e-2}[dtype]
    for path, leaf in before.leaves.items():
        np.testing.assert_allclose(again.read(path), leaf.read(), atol=exact, err_msg=path)
    base = random_tensors(with_llm(vocab=94), ("llm", "head"), {"llm": "model.", "head": "lm_head."})
    name = "model.layers.0.mlp.up_proj.weight"
    want = before.read("llm/blocks/mlp/up/kernel")[0].T - base[name]
    np.testing.assert_allclose(made[name].read(full(want.shape)), want, atol=exact)


def test_a_foreign_delta_has_no_manifest(tmp_path, target):
    run(source=target, base=tmp_path / "base", delta="make", to=tmp_path / "delta", dtype="float32")
    (tmp_path / "delta" / FILE).unlink()
    run(source=tmp_path / "delta", base=tmp_path / "base", delta="apply", to=tmp_path / "again")
    got = open_checkpoint(tmp_path / "again").read("llm/head/kernel")
    np.testing.assert_allclose(got, open_checkpoint(target).read("llm/head/kernel"), atol=1e-6)


@pytest.mark.parametrize("llm, sentence", [
    ({"layers": 1}, r"other is another base: it lacks model\.layers\.1\.\S+, of which .*target/model\.safetensors has a difference"),
    ({"layers": 3}, r"other is another base: its model\.layers\.2\.\S+ has no counterpart"),
    ({"mlp": 40}, r"other is another base: its model\.layers\.0\.mlp\.down_proj\.weight has shape \[32, 40\], "
                  r"model\.layers\.0\.mlp\.down_proj\.weight in .* has \[32, 72\]"),
])  # fmt: skip
def test_another_base(tmp_path, target, llm, sentence):
    other = llm_directory(tmp_path / "other", with_llm(**llm))
    with pytest.raises(CheckpointError, match=sentence):
        run(source=target, base=other, delta="make", to=tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_wrong_flags_and_directories(tmp_path, target):
    base = tmp_path / "base"
    for flags, sentence in (
        ({}, "convert --delta make: give the directory of the base with --base"),
        ({"base": base, "vision": base}, "convert --delta make: --vision has no meaning for it"),
        ({"base": base, "delta": "take"}, "--delta='take' is unknown: use one of make, apply"),
        ({"base": base, "to": target}, "a checkpoint is not converted onto itself"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(**{"source": target, "to": tmp_path / "x", "delta": "make"} | flags)
    with pytest.raises(CheckpointError, match="target holds model weights where --delta apply needs a delta"):
        run(source=target, base=base, delta="apply", to=tmp_path / "x")
    write_json(base / "adapter_config.json", {})
    with pytest.raises(CheckpointError, match="base holds adapter weights where --delta make needs a model"):
        run(source=target, base=base, delta="make", to=tmp_path / "x")
    odd = write_tensors(tmp_path / "odd", {"resnet.conv1": np.zeros(3, np.float32)}, llm_to_hf(TINY.llm))
    with pytest.raises(CheckpointError, match="has resnet.conv1, which belongs to no part of a LLaVA model"):
        run(source=odd, base=odd, delta="make", to=tmp_path / "x")
