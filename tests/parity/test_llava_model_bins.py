"""torch.save files of goldens/llava_model/*_bin: zip and legacy format, f32 / bf16 / f16, strided, Parameter
and scalar tensors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.goldens import cases
from vlm_jax.convert import torch_pickle
from vlm_jax.convert.tensors import full

FILES = [path for path in cases("llava_model", "*_bin/*") if path.suffix in (".bin", ".pt", ".pth")]


def each(test):
    """Once per file; where there is none the test is not collected."""
    mark = pytest.mark.parametrize("path", FILES, ids=[f"{p.parent.name}/{p.name}" for p in FILES])
    return mark(test) if FILES else None


def reference(path: Path) -> dict[str, np.ndarray]:
    """Arrays of one file: `<kind>:<key>` where the file is called `<kind>`, `<something>_<kind>` or
    `<kind>_<something>`.
    """
    with np.load(path.parent / "reference.npz") as file:
        kinds = {key.partition(":")[0] for key in file.files}
        (kind,) = [k for k in kinds if k == path.stem or path.stem.endswith(f"_{k}") or path.stem.startswith(f"{k}_")]
        return {key.partition(":")[2]: file[key] for key in file.files if key.startswith(f"{kind}:")}


@each
def test_reads_without_torch(path):
    want, got = reference(path), torch_pickle.read_tensors(path)
    assert got.keys() == want.keys()
    for key, tensor in got.items():
        assert tensor.shape == want[key].shape
        np.testing.assert_array_equal(tensor.read(full(tensor.shape)).astype(want[key].dtype), want[key], err_msg=key)


@each
def test_slices_read_the_same(path):
    for key, tensor in torch_pickle.read_tensors(path).items():
        index = tuple(slice(n // 3, n - n // 4) for n in tensor.shape)
        np.testing.assert_array_equal(tensor.read(index), tensor.read(full(tensor.shape))[index], err_msg=key)


@each
def test_what_we_write_torch_loads(path, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {key: tensor.read(full(tensor.shape)) for key, tensor in torch_pickle.read_tensors(path).items()}
    torch_pickle.save(tmp_path / "mm_projector.bin", arrays)
    theirs = torch.load(path, weights_only=True)
    for mapped in (False, True):
        ours = torch.load(tmp_path / "mm_projector.bin", weights_only=True, mmap=mapped)
        assert list(ours) == list(theirs)
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key].data), key
