"""The rule of LLaVA's make_delta and apply_delta, on the tensors that they wrote."""

from __future__ import annotations

import numpy as np

from tests.goldens import golden
from vlm_jax.convert.delta import SIGNS, combined
from vlm_jax.convert.tensors import Tensor


def tensors(z, part):
    found = {key.removeprefix(f"{part}:"): z[key] for key in z.files if key.startswith(f"{part}:")}
    return {name: Tensor(name, x.shape, x.dtype, part, lambda index, x=x: x[index]) for name, x in found.items()}


def check(z, action, source, result):
    made = list(combined(tensors(z, source), tensors(z, "base"), SIGNS[action], "base"))
    wanted = tensors(z, result)
    assert {tensor.name for tensor in made} == wanted.keys()
    for tensor in made:
        np.testing.assert_allclose(tensor.read(), z[f"{result}:{tensor.name}"], atol=1e-6, err_msg=tensor.name)


@golden("llava_model", "delta*.npz")
def test_make_and_apply(path):
    z = np.load(path)
    check(z, "make", "target", "delta")
    check(z, "apply", "delta", "target")
