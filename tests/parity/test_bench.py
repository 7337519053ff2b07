"""The referees of launch/bench run to their end on the smallest size: both sides do the same work, or they would stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "launch" / "bench"
pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.long]


def run(script: str, out: Path, *flags: str) -> tuple[dict, str]:
    """(results, what was printed) of a bench."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    command = [
        sys.executable,
        str(BENCH / script),
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
        *flags,
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_training_of_both_sides_has_one_loss(tmp_path):
    pytest.importorskip("peft")
    flags = "--streams mixed --mode lora --rank 4 --rows 2 --micro 1 --peer_batch 3".split()
    found, printed = run("train.py", tmp_path / "train.json", *flags)
    mixed = found["mixed"]
    first = mixed["first"]["mixed"]
    assert first["loss"] > 1 and first["grad_norm"] > 0
    ways = [tried["way"] for side in mixed["tried"].values() for tried in side[1] if "failed" not in tried]
    assert {way.get("order", "ours") for way in ways} == {"ours", "drawn", "by length"}
    assert set(mixed["spent"]) == {"ours", "ours, read", "peer", "peer, read"}
    # the same update from the files as from what is kept: the losses go on falling from the first
    assert all(one["loss"] < first["loss"] for one in mixed["spent"].values())
    assert 0.6 < mixed["plan"]["full"] <= 1 and "real tokens/s" in printed


def test_both_sides_decode_the_same_text(tmp_path):
    found, printed = run("decode.py", tmp_path / "decode.json", *"--batches 2 --prompt 48 --new 4".split())
    assert found["2"]["equal"] == 1 and not [row for row in found["2"]["rows"].values() if "failed" in row]
    assert "peer, static cache" in printed


def test_both_sides_answer_the_same_questions(tmp_path):
    flags = "--questions 5 --batch 4 --new 8".split()
    found, printed = run("eval_throughput.py", tmp_path / "eval.json", *flags)
    ours, peer = (found["found"][name]["ids"] for name in ("ours", "peer, one at a time"))
    assert ours == peer and len(ours) == 5 and len({len(ids) for ids in ours}) > 1
    assert "questions/s" in printed
