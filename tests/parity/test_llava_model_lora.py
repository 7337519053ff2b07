"""Adapters in the files that haotian-liu/LLaVA writes: read with their base, merged, and run beside the base's kernels."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.convert.models import write_tensors
from tests.golden_model import assign_images, load, row_batch, weights_of
from tests.goldens import cases
from vlm_jax.convert.files import read_json
from vlm_jax.convert.llava_config import vlm_to_llava
from vlm_jax.convert.merge import merged, open_adapted
from vlm_jax.convert.shards import read_directory, read_file
from vlm_jax.convert.tensors import full
from vlm_jax.convert.torch_pickle import read_tensors
from vlm_jax.convert.write import export
from vlm_jax.convert.write_adapter import export_adapter
from vlm_jax.models import vlm

ADAPTERS = [path.parent for path in cases("llava_model", "*/adapter_config.json")]
TOWER = "model.vision_tower."


@pytest.fixture(params=ADAPTERS, ids=lambda folder: folder.name)
def case(request, tmp_path):
    """(reference numbers, base with the adapter, the adapter): the base is written as an original LLaVA directory."""
    folder = request.param
    z = np.load(folder / "reference.npz")
    config, _ = load(folder.parent, z)
    tower = {k: v for k, v in weights_of(np.load(folder.parent / "weights.npz")).items() if k.startswith(TOWER)}
    base = write_tensors(tmp_path / "base", tower | weights_of(z), vlm_to_llava(config, {}, "float32", None))
    return z, *open_adapted(folder, base=base)


def logits_of(z, checkpoint):
    config = checkpoint.config
    keep = z["attention_mask"].astype(bool)
    views, sizes = assign_images(z["input_ids"], keep, list(z["images"]))
    batch = row_batch(config, z["input_ids"], keep, z["labels"], views, sizes)
    model = vlm.build(config, {path: leaf.read() for path, leaf in checkpoint.leaves.items()})
    logits = np.asarray(jax.jit(lambda batch: model.logits(vlm.forward(model, batch)))(batch))
    nll = -np.asarray(jax.nn.log_softmax(logits))[(*np.indices(batch["targets"].shape), batch["targets"])]
    return batch["segments"] > 0, logits, (nll * batch["weights"]).sum() / batch["weights"].sum()


def test_merged_tensors(case, tmp_path):
    z, checkpoint, _ = case
    one = merged(checkpoint)
    export(tmp_path / "merged", one.config, one.leaves, names="source", source=one)
    written = read_directory(tmp_path / "merged")
    for name in (key for key in z.files if key.startswith("merged:")):
        tensor = written[name.removeprefix("merged:")]
        np.testing.assert_allclose(tensor.read(full(tensor.shape)), z[name], atol=1e-6, err_msg=name)


def test_what_was_trained_whole_wins(case):
    z, checkpoint, adapter = case
    assert adapter.extra
    for path, mine in adapter.extra.items():
        for layer, (entry, tensor) in mine.items():
            got = checkpoint.read(path) if layer is None else checkpoint.read(path)[layer]
            np.testing.assert_array_equal(entry.layout.write(got, entry.shape), tensor.read(full(tensor.shape)))


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "beside the kernels"])
def test_logits(case, apart):
    z, checkpoint, _ = case
    real, logits, loss = logits_of(z, checkpoint if apart else merged(checkpoint))
    want = z["logits"]
    for row in range(len(real)):
        np.testing.assert_allclose(logits[row, real[row]], want[row, : real[row].sum()], atol=2e-4)
    np.testing.assert_allclose(loss, z["loss"], atol=1e-5)


def contents(file) -> dict[str, tuple]:
    """{name: (dtype, shape, bytes)} of a file of tensors."""
    found = read_file(file) if file.suffix == ".safetensors" else read_tensors(file)
    return {name: (str(t.dtype), t.shape, t.read(full(t.shape)).tobytes()) for name, t in found.items()}


def test_written_again(case, tmp_path):
    """As the files that the training code writes, and by way of PEFT's names for transformers' port."""
    _, checkpoint, adapter = case
    trained = dict.fromkeys(adapter.extra)
    export_adapter(tmp_path / "hf", checkpoint.config, checkpoint.leaves, trained=trained, base=checkpoint.directory)
    through, _ = open_adapted(tmp_path / "hf")
    export_adapter(tmp_path / "llava", through.config, through.leaves, trained=trained, names="llava")
    for name in ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"):
        if (adapter.directory / name).is_file():
            mine = tmp_path / "llava" / name.replace("adapter_model.bin", "adapter_model.safetensors")
            assert contents(mine) == contents(adapter.directory / name)
    ours, theirs = (read_json(folder / "adapter_config.json") for folder in (tmp_path / "llava", adapter.directory))
    assert [ours[key] for key in ("peft_type", "r", "lora_alpha")] == [
        theirs[key] for key in ("peft_type", "r", "lora_alpha")
    ]
    if isinstance(theirs["target_modules"], list):
        assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])
