"""Killed and started again, a run is the run that was never killed, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_jax.train.metrics import read_metrics

SCRIPT = Path(__file__).with_name("run_training.py")
STEPS = 14


def start(folder, slow=0.0, **more):
    env = os.environ | {"SECONDS_PER_BATCH": str(slow), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | more
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), str(STEPS)], env=env, **pipes)


def finish(process, seconds=300):
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def wait_for_step(folder, step, process, seconds=300):
    """Until the log shows `step` (whole lines only)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if any(line["step"] >= step for line in read_metrics(folder)):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {process.stdout.read() if process.poll() is not None else 'too slow'}")


def curve(folder):
    """What must not depend on interruptions: everything but the speeds."""
    return [(m["step"], m["lr"], m["loss"], m["grad_norm"], m["param_norm"], m["slots"]) for m in read_metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    text = finish(start(folder))
    assert f"ended: finished at {STEPS}" in text, text
    assert [step for step, *_ in curve(folder)] == list(range(1, STEPS + 1))
    return folder


@pytest.mark.parametrize("step", [1, 8])
def test_kill_9_and_restart(undisturbed, tmp_path, step):
    process = start(tmp_path, slow=0.15)
    wait_for_step(tmp_path, step, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    text = finish(start(tmp_path))
    assert f"ended: finished at {STEPS}" in text, text
    assert curve(tmp_path) == curve(undisturbed)


@pytest.mark.slow
@pytest.mark.long
def test_an_encoder_decoder_is_killed_too(tmp_path):
    """What T5's dropout draws depends on the step alone; the program is compiled once for all three processes."""
    both = {"ENCODER_DECODER": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    assert f"ended: finished at {STEPS}" in finish(start(tmp_path / "whole", **both))
    process = start(tmp_path / "killed", slow=0.15, **both)
    wait_for_step(tmp_path / "killed", 8, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert f"ended: finished at {STEPS}" in finish(start(tmp_path / "killed", **both))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_sigterm_saves_and_leaves_with_0(undisturbed, tmp_path):
    process = start(tmp_path, slow=0.15)
    wait_for_step(tmp_path, 4, process)
    process.terminate()
    text = finish(process)
    assert process.returncode == 0, text
    stopped = int(text.split("ended: stopped at ")[1])
    assert 4 <= stopped < STEPS and f"stopped by SIGTERM: step {stopped} of {STEPS} is saved in" in text
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == [stopped]
    text = finish(start(tmp_path))
    assert f"the checkpoint of step {stopped} is read" in text
    assert curve(tmp_path) == curve(undisturbed)


def test_a_finished_run_says_so(undisturbed):
    before = curve(undisturbed)
    process = start(undisturbed)
    text = finish(process)
    assert process.returncode == 0
    assert f"is finished: all {STEPS} steps are done" in text and f"ended: already finished at {STEPS}" in text
    assert curve(undisturbed) == before
