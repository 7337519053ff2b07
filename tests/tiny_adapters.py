"""The directory of `tiny_model` with two adapters in PEFT directories: other ranks, other linears, one with a projector of its own."""

import dataclasses

import numpy as np

from tests import tiny_model
from vlm_jax.config import LoRAConfig
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.write_adapter import export_adapter
from vlm_jax.models import vlm

GROUPS = {
    "a": (LoRAConfig(("^llm/blocks/",), rank=3, alpha=6.0),),
    "b": (LoRAConfig(("attn/(q|v)$",), rank=2, alpha=4.0, rslora=True),),  # the tower's too
}
WHOLE = {"a": {"projector/layer_0/kernel": None, "projector/layer_0/bias": None}, "b": {}}


def write(folder):
    """Write folder/model, folder/a and folder/b; returns ({"model" and every adapter: directory}, {adapter: (config, parameters)})."""
    base = tiny_model.write(folder)
    checkpoint = open_checkpoint(base)
    made = {}
    for number, (name, groups) in enumerate(GROUPS.items()):
        config = dataclasses.replace(checkpoint.config, lora=groups)
        rng = np.random.default_rng(number)
        params = {path: leaf.read() for path, leaf in checkpoint.leaves.items()}
        for path, like in vlm.shapes(config).items():
            if "/lora_" in path and not path.startswith("tower/unused/"):
                value = (
                    np.full(like.shape, groups[0].scale) if path.endswith("scale") else rng.normal(0, 0.3, like.shape)
                )
                params[path] = value.astype(np.float32)
        for path in WHOLE[name]:
            params[path] = params[path] + rng.normal(0, 0.1, params[path].shape).astype(np.float32)
        export_adapter(folder / name, config, params, trained=WHOLE[name], base=base)
        made[name] = config, params
    return {"model": base, **{name: folder / name for name in GROUPS}}, made


def merged(made, weights):
    """The parameters of the base with the adapters mixed in by {name: weight}, in numpy."""
    config, params = next(iter(made.values()))
    out = {path: value.copy() for path, value in params.items() if "/lora_" not in path}
    base = made["b"][1]  # trains nothing whole
    for path in WHOLE["a"]:
        out[path] = base[path] + weights.get("a", 0.0) * (params[path] - base[path])
    for name, weight in weights.items():
        mine = made[name][1]
        for path in mine:
            if path.endswith("lora_a"):
                linear = path.removesuffix("/lora_a")
                pair = mine[path] * mine[f"{linear}/lora_scale"][..., None, :] @ mine[f"{linear}/lora_b"]
                out[f"{linear}/kernel"] = out[f"{linear}/kernel"] + weight * pair
    return out
