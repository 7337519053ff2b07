"""How fast do weights get from safetensors shards to sharded arrays: against reading the files, and with how much memory.

    python launch/bench/weights.py [--gigabytes 4] [--devices 8] [--rounds 1] [--folder DIR]

A LLaVA of Llama layers as wide as 7B's (as many as fill N GB, random bfloat16) in shards of 2 GB is read by `train.state.create` onto
fake devices along fsdp, frozen parameters in bfloat16 as a stage-1 run has them. Every line is a process of its own, the fastest of
`rounds`. "Into new memory" is the least that loading can be: the files are read into as many bytes of memory as they have, which the
system has to find and clear first (a virtual machine that gave them back has to ask for them again, for up to 2 s per GB). Without
"files in memory" a line begins with the files out of it, as far as the system lets go of them. Memory: most bytes resident above those
before loading, by kind, over the bytes of the weights, of which this one host holds all; what is mapped from files is reclaimable.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

BLOCK = 16 << 20


def write_llava(folder: Path, gigabytes: float) -> None:
    """A LLaVA directory of about `gigabytes` in HF's format."""
    import dataclasses

    from vlm_jax.config import LLMConfig, VLMConfig
    from vlm_jax.convert import names
    from vlm_jax.convert.files import write_json
    from vlm_jax.convert.hf_config import vlm_to_hf
    from vlm_jax.convert.shards import Planned, write_directory
    from vlm_jax.convert.tensors import DTYPES

    layer = 2 * sum(np.prod(e.shape) for e in names.entries(VLMConfig(llm=LLMConfig(layers=1))) if e.layer == 0)
    rest = 2 * sum(np.prod(e.shape) for e in names.entries(VLMConfig(llm=LLMConfig(layers=1)))) - layer
    layers = max(1, round((gigabytes * 1e9 - rest) / layer))
    config = dataclasses.replace(VLMConfig(), llm=LLMConfig(layers=layers))
    noise = np.random.default_rng(0).normal(0, 0.02, 50_000_000).astype(DTYPES["bf16"])

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(noise, shape)

    tensors = [
        Planned(names.key_of(e, "hf"), e.shape, DTYPES["bf16"], lambda e=e: values(e.shape))
        for e in names.entries(config)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_directory(folder, tensors, 2 * 10**9)
    write_json(folder / "config.json", vlm_to_hf(config, 32000, {}, "bfloat16"))
    os.sync()


def files(folder: Path) -> list[Path]:
    """The shards."""
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Ask the system to drop the files from memory."""
    for path in files(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory(threading.Thread):
    """Most resident bytes above those at the start: {"RssAnon", "RssFile"}, looked at a hundred times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self._first, self.most, self.done = self.now(), {"RssAnon": 0, "RssFile": 0}, threading.Event()

    @staticmethod
    def now() -> dict[str, int]:
        """Resident bytes by kind."""
        rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}

    def run(self) -> None:
        """Until `done`."""
        while not self.done.wait(0.01):
            now = self.now()
            self.most = {key: max(most, now[key] - self._first[key]) for key, most in self.most.items()}


def read_plainly(folder: Path, keep: bool) -> None:
    """Every file from its beginning to its end, into one buffer, or (keep) into memory for all of them."""
    sizes = {path: path.stat().st_size for path in files(folder)}
    kept = memoryview(np.empty(sum(sizes.values()) if keep else BLOCK, np.uint8))
    for path, size in sizes.items():
        room, kept = (kept[:size], kept[size:]) if keep else (kept, kept)
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(room[:BLOCK]):
                room = room[count:] if keep else room


def load(folder: Path) -> None:
    """The weights on all devices."""
    import jax

    from vlm_jax.convert.read import open_checkpoint
    from vlm_jax.parallel import rules
    from vlm_jax.parallel.mesh import make_mesh
    from vlm_jax.train.options import STAGE1, TrainConfig
    from vlm_jax.train.state import create
    from vlm_jax.train.weights import Source

    checkpoint = open_checkpoint(str(folder))
    with rules.use(make_mesh()):
        state = create(checkpoint.config, TrainConfig(trainable=STAGE1), Source(checkpoint))
    jax.block_until_ready(state.params)


def measure(folder: Path, how: str) -> dict[str, float]:
    """{"seconds", "cpu" (processor seconds), "RssAnon", "RssFile"} of one way, in this process."""
    if how == "load":  # what is imported and started is no part of it
        import jax

        import vlm_jax.train.weights  # noqa: F401

        jax.devices()
    memory = Memory()
    memory.start()
    began, used = time.perf_counter(), time.process_time()
    load(folder) if how == "load" else read_plainly(folder, keep=how == "kept")
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    memory.done.set()
    memory.join()
    return {"seconds": seconds, "cpu": cpu, **memory.most}


def main(gigabytes: float, devices: int, rounds: int, folder: Path) -> None:
    """Write the directory where it is not there, measure, print the table."""
    model = folder / f"llava_{gigabytes:g}GB"
    if not (model / "config.json").exists():
        write_llava(model, gigabytes)
    size = sum(path.stat().st_size for path in files(model))
    print(f"{size / 1e9:.2f} GB in {len(files(model))} files, {devices} fake devices, {os.cpu_count()} cores\n")
    print(
        "| what | files in memory | seconds | GB/s | CPU s | anonymous / weights | mapped / weights |\n|---|---|---|---|---|---|---|"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    names = {"plain": "reading", "kept": "reading into new memory", "load": f"onto {devices} devices"}
    for cold, (how, name) in itertools.product((True, False), names.items()):
        found = []
        for _ in range(rounds):
            if cold:
                forget(model)
            command = [sys.executable, __file__, "--measure", how, "--folder", str(model)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            found.append(json.loads(done.stdout))
        m = min(found, key=lambda one: one["seconds"])
        print(
            f"| {name} | {'no' if cold else 'yes'} | {m['seconds']:.1f} | {size / m['seconds'] / 1e9:.2f} | {m['cpu']:.1f} | "
            f"{m['RssAnon'] / size:.2f} | {m['RssFile'] / size:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the model is written and left (default: a temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.folder, chosen.measure)))
    elif chosen.folder:
        main(chosen.gigabytes, chosen.devices, chosen.rounds, chosen.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(chosen.gigabytes, chosen.devices, chosen.rounds, Path(temporary))
