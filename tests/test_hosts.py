"""Two processes with one device each train like one: start-up, own rows, one checkpoint, equal losses."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.train.metrics import read_metrics

SCRIPT = """
import dataclasses, os, sys
import jax
from tests.small_runs import Batches, EXACT, MODEL, Weights
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import make_mesh
from vlm_jax.train.loop import train
from vlm_jax.train.options import STAGE1

hosts.initialise()
mesh = make_mesh()
index, count = hosts.data_shard(mesh)
assert (index, count) == (jax.process_index(), jax.process_count()), (index, count)

class Mine(Batches):
    def __next__(self):
        step, rows = super().__next__()
        each = len(rows["tokens"]) // count
        return step, {k: v[index * each : (index + 1) * each] for k, v in rows.items()}

config = dataclasses.replace(EXACT, trainable=STAGE1, global_batch=4, steps=int(sys.argv[2]), save_every=2)
def batches(start, state):
    return Mine(start, rows=4)

result = train(config, MODEL, batches, sys.argv[1], mesh=mesh, source=Weights(), progress=False)
print("ended:", result.status, result.step, flush=True)
os._exit(0)
"""


MEASURING = """
import os, sys
from pathlib import Path
import jax
from tests.tiny_data import TINY, encode, make_records
from vlm_jax.data.manifest import DataError, Layout
from vlm_jax.data.measuring import Limits, Means, measure_sources
from vlm_jax.parallel import hosts
from vlm_jax.train.command import first_process_first

hosts.initialise()
calls = []

def counted(record):
    calls.append(record)
    return encode(record)

class Kept(list):
    fingerprint = "records"

counted.fingerprint = "counted"
records = Kept({**record, "images": [], "tokens": [max(t, 1) for t in record["tokens"]]} for record in make_records(["x"]))
folder = Path(sys.argv[1]) / ("" if sys.argv[2] == "1" else str(jax.process_index()))
layout = Layout(counted, TINY, 64, 4)
found = measure_sources({"a": records}, layout, means=Means(folder), turn=first_process_first)["a"]
print("encoded", len(calls), hosts.agree(found.digest()), hosts.agree(str(jax.process_index())), flush=True)
records.append({"tokens": [1], "images": []})
records.fingerprint = "one more"
try:
    measure_sources({"a": records}, layout, Limits(max_share=0.0), Means(folder), turn=first_process_first)
except DataError as error:
    print("refused:", error, flush=True)
os._exit(0)
"""


def launch(folder, processes, steps, script=SCRIPT):
    """Run the script in `processes` processes; their outputs. A process that hangs is killed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    running = []
    for index in range(processes):
        joined = (
            {
                "VLM_JAX_COORDINATOR": address,
                "VLM_JAX_PROCESSES": str(processes),
                "VLM_JAX_PROCESS": str(index),
            }
            if processes > 1
            else {}
        )
        command = [sys.executable, "-c", script, str(folder), str(steps)]
        running.append(
            subprocess.Popen(command, env=env | joined, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        return [p.communicate(timeout=300)[0] for p in running]
    finally:
        for p in running:
            p.kill()


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    alone = launch(tmp_path / "one", 1, 4)
    assert "ended: finished 4" in alone[0], alone[0]
    together = launch(tmp_path / "two", 2, 4)
    assert all("ended: finished 4" in text for text in together), together
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [m["step"] for m in two] == [1, 2, 3, 4]
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"] and a["views"] == b["views"] and a["padding"] == b["padding"]
        np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-5)
    again = launch(tmp_path / "two", 1, 6)  # the checkpoint of two processes continues in one
    assert "ended: finished 6" in again[0], again[0]


@pytest.mark.slow
def test_the_first_process_measures_and_the_others_read(tmp_path):
    """On a shared disk; without one everybody measures. An error is everybody's, nobody waits for ever."""
    for shared, encoded in ((1, 0), (0, 40)):
        first, second = launch(tmp_path / str(shared), 2, shared, MEASURING)
        assert "encoded 40 True False" in first and f"encoded {encoded} True False" in second, (first, second)
        for said in (first, second):
            assert "refused: 1 of 41 records (2.4%) cannot be trained on, more than data.max_bad_share=0 allows" in said


def test_one_process_loads_every_row():
    for config in (MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4), MeshConfig(data=2, fsdp=2, seq=2)):
        assert hosts.data_shard(make_mesh(config, jax.devices())) == (0, 1)


def test_a_coordinator_without_a_number_of_processes(monkeypatch):
    monkeypatch.setenv("VLM_JAX_COORDINATOR", "localhost:1")
    monkeypatch.delenv("VLM_JAX_PROCESSES", raising=False)
    with pytest.raises(ConfigError, match="VLM_JAX_PROCESSES='' must be a number"):
        hosts.initialise()
