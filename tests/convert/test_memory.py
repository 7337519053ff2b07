"""A conversion, also of an adapter into its base, holds a few tensors at a time, never the model."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import dataclasses
import sys
import numpy as np
from vlm_jax.config import LLMConfig, LoRAConfig, VisionConfig, VLMConfig
from vlm_jax.convert import names
from vlm_jax.convert.command import convert_model
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.tensors import resolve
from vlm_jax.convert.write import export
from vlm_jax.convert.write_adapter import export_adapter

class Ones:
    def __init__(self, shape):
        self.shape, self.dtype = shape, np.dtype(np.float32)
    def read(self, index=()):
        return np.ones([i.stop - i.start for i in resolve(index, self.shape)], self.dtype)

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

llm = LLMConfig(vocab=2000, width=384, mlp=1024, layers=24, heads=6, kv_heads=6, head_dim=64)
config = VLMConfig(vision=VisionConfig(width=64, heads=4, mlp=128, layers=3), llm=llm)
stacks = {}
for entry in names.entries(config):
    stacks.setdefault(entry.path, []).append(entry)
layers = {path: () if e[0].layer is None else (len(e),) for path, e in stacks.items()}
params = {path: Ones(layers[path] + e[0].layout.shape(e[0].shape)) for path, e in stacks.items()}
size = sum(4 * int(np.prod(z.shape)) for z in params.values())
before = peak()
export(sys.argv[1] + "/a", config, params, max_shard=size // 8)
written = peak()
convert_model(sys.argv[1] + "/a", sys.argv[1] + "/b", names="hf_5", max_shard=size // 8)
checkpoint = open_checkpoint(sys.argv[1] + "/b")
leaf = checkpoint.leaves["llm/blocks/mlp/up/kernel"]
for column in range(8):
    leaf.read((slice(None), slice(None), slice(128 * column, 128 * (column + 1))))
up = {"lora_a": (24, 384, 4), "lora_b": (24, 4, 1024), "lora_scale": (24, 4)}
adapter = {f"llm/blocks/mlp/up/{name}": Ones(shape) for name, shape in up.items()}
with_adapter = dataclasses.replace(config, lora=(LoRAConfig(("up$",), 4, 8.0),))
export_adapter(sys.argv[1] + "/c", with_adapter, adapter, base=sys.argv[1] + "/a")
convert_model(sys.argv[1] + "/c", sys.argv[1] + "/b", merge=True, max_shard=size // 8)
assert (open_checkpoint(sys.argv[1] + "/b").leaves["llm/blocks/mlp/up/kernel"].read((slice(5, 6),)) == 5).all()
print(size, written - before, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_below_one_shard(tmp_path):
    run = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    size, export, everything = map(int, done.stdout.split())
    assert size > 150e6 and export < size / 8 and everything < size / 6, (size, export, everything)
