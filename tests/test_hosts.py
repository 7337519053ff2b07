"""Start-up under every launcher, limits, and who measures the data; what a run of several processes does is tests/contracts/test_hosts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster, cluster

from vlm_jax.config import ConfigError
from vlm_jax.parallel import hosts
from vlm_jax.parallel.mesh import MeshConfig, make_mesh

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


def launch(folder, processes, argument, script):
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
        command = [sys.executable, "-c", script, str(folder), str(argument)]
        running.append(
            subprocess.Popen(command, env=env | joined, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        return [p.communicate(timeout=300)[0] for p in running]
    finally:
        for p in running:
            p.kill()


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


@pytest.fixture
def joined(monkeypatch):
    """What jax would be told: [(coordinator, processes, process, limits)], with what it finds out by itself on this host."""
    for name in [*os.environ]:
        if name.startswith(("VLM_JAX_", "SLURM_", "MEGASCALE_", "TPU_", "JAX_COORD")):
            monkeypatch.delenv(name)
    calls = []

    def initialize(coordinator=None, processes=None, process=None, **limits):
        found = cluster.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, None, limits["initialization_timeout"]
        )
        calls.append((*found[:3], limits))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    return calls


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(hosts, "_on_tpu_host", lambda: True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_alone_nothing_is_joined(joined):
    hosts.initialise()
    hosts.initialise("", -1, -1, 0.0, 0.0)  # the flags' defaults
    assert joined == []


def test_a_coordinator_by_arguments_and_by_variables(joined, monkeypatch):
    hosts.initialise("a:1234", 4, 3, 20.0, 50.0)
    limits = {"initialization_timeout": 20 + hosts.MARGIN, "heartbeat_timeout_seconds": 50 + hosts.MARGIN}
    assert joined.pop() == ("a:1234", 4, 3, limits)
    set_all(monkeypatch, VLM_JAX_COORDINATOR="b:1", VLM_JAX_PROCESSES="8", VLM_JAX_PROCESS="0")
    set_all(monkeypatch, VLM_JAX_CONNECT_SECONDS="7", VLM_JAX_HEARTBEAT_SECONDS="9")
    hosts.initialise()
    assert joined.pop() == ("b:1", 8, 0, {"initialization_timeout": 37, "heartbeat_timeout_seconds": 39})
    hosts.initialise("c:2", -1, 5)
    assert joined.pop()[:3] == ("c:2", 8, 5), "what is given wins, the rest is from the variables"


def test_slurm(joined, monkeypatch):
    set_all(monkeypatch, SLURM_JOB_ID="4096", SLURM_STEP_NODELIST="gpu[007-009],other", SLURM_NTASKS="16")
    set_all(monkeypatch, SLURM_PROCID="9", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="16")
    hosts.initialise()
    assert joined.pop()[:3] == ("gpu007:61440", 16, 9)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # python typed in a job's shell
    hosts.initialise()
    assert joined == []


@pytest.mark.parametrize(
    "slices, expected",
    [
        ({}, ("w0:8482", 4, 2)),
        (
            {"MEGASCALE_COORDINATOR_ADDRESS": "s0w0:8080", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1"},
            ("s0w0:8482", 12, 6),
        ),
    ],
    ids=["one slice", "three slices"],
)
def test_gke_and_tpu_vms(joined, on_tpu, monkeypatch, slices, expected):
    """A slice of four hosts, this one the third; several slices are told by MEGASCALE_*, on TPU VMs through the metadata server."""
    settings = {"TPU_WORKER_HOSTNAMES": "w0,w1,w2,w3", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"} | slices
    with monkeypatch.context() as gke:
        set_all(gke, **settings | {"MEGASCALE_COORDINATOR_ADDRESS": slices.get("MEGASCALE_COORDINATOR_ADDRESS", "")})
        set_all(gke, **{name: slices.get(name, "") for name in ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")})
        hosts.initialise()
    assert joined.pop()[:3] == expected
    metadata = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "w0,w1,w2,w3",
        "tpu-env": "\n".join(f"{name}: '{value}'" for name, value in slices.items()),
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    hosts.initialise()
    assert joined.pop()[:3] == expected


def test_what_the_cluster_cannot_tell_is_one_sentence(joined, on_tpu, monkeypatch):
    def unreachable(key):
        raise RuntimeError(f"Getting metadata['{key}'] failed for 6 tries")

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    with pytest.raises(
        ConfigError, match=r"^the other processes could not be joined: Getting metadata.*give --coordinator"
    ):
        hosts.initialise()


@pytest.mark.parametrize(
    "arguments, variables, sentence",
    [
        (("localhost", 2, 0), {}, "the coordinator 'localhost' must be HOST:PORT of process 0"),
        (("localhost:1", 2, 2), {}, "process 2 of 2 cannot be: --process_id goes from 0 to --process_count - 1"),
        ((), {"VLM_JAX_COORDINATOR": "localhost:1"}, "VLM_JAX_PROCESSES='' must be a number"),
        (
            ("localhost:1", 2, 0),
            {"VLM_JAX_CONNECT_SECONDS": "soon"},
            "VLM_JAX_CONNECT_SECONDS='soon' must be a positive",
        ),
        (("localhost:1", 2, 0), {"VLM_JAX_HEARTBEAT_SECONDS": "0"}, "VLM_JAX_HEARTBEAT_SECONDS='0' must be a positive"),
    ],
)
def test_mistakes(joined, monkeypatch, arguments, variables, sentence):
    set_all(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        hosts.initialise(*arguments)
    assert joined == []
