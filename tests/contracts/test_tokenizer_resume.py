"""Killed in the middle of training against a critic and started again, a run is the run that was never killed, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.contracts.test_resume import finish, wait_for_step
from vlm_jax.train.metrics import read_metrics

SCRIPT = Path(__file__).with_name("run_tokenizer_training.py")
STEPS = 14
SPEEDS = ("seconds_per_step", "images_per_second", "data_stall")


def start(folder, slow=0.0):
    env = os.environ | {"SECONDS_PER_BATCH": str(slow), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    # the three processes run the same program: compiled once
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), str(STEPS)], env=env, **pipes)


def curve(folder):
    """Every number of every line but the speeds."""
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in read_metrics(folder)]


def test_kill_9_and_restart(tmp_path):
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    text = finish(start(undisturbed))
    assert f"ended: finished at {STEPS}" in text, text
    process = start(folder, slow=0.2)
    wait_for_step(
        folder, 8, process
    )  # saving step 6 waits until step 3 is on disk; both networks are trained from step 2 on
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    text = finish(start(folder))
    assert "the checkpoint of step" in text and f"ended: finished at {STEPS}" in text, text
    assert curve(folder) == curve(undisturbed)
    lines = curve(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["critic_loss"] == 0 and all(line["critic_loss"] > 0 for line in lines[1:])
    assert len({line["perplexity"] for line in lines}) > 3
