"""Killed and started again, in one process or two, `tokenize` leaves the shards that it would have left undisturbed, byte for byte."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax.convert.visual_tokenizer import save_tokenizer
from vlm_jax.data.code_records import open_codes
from vlm_jax.generate.tokenize import tokenize
from vlm_jax.visual_tokenizers import names

SCRIPT, IMAGES = Path(__file__).with_name("run_tokenize.py"), 18


def start(folder, out, slow=0.0, **variables):
    environment = os.environ | {"SECONDS_PER_IMAGE": str(slow), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | variables
    words = [sys.executable, str(SCRIPT), str(folder / "model"), str(folder / "images"), str(out)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenize")
    save_tokenizer(place / "model", TINY["vq"], *names.read(TINY["vq"], tensors(TINY["vq"])))
    (place / "images").mkdir()
    rng = np.random.default_rng(0)
    for k in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(place / f"images/{k:02d}.png")
    (place / "images/07.png").write_bytes(b"no image")
    process = start(place, place / "whole.arrayrecord")
    assert "ended" in process.communicate(timeout=300)[0]
    return place


def shards(folder, stem):
    return {file.name.removeprefix(stem): file.read_bytes() for file in folder.glob(f"{stem}-*.arrayrecord")}


def test_kill_9_and_restart(folder):
    process = start(folder, folder / "killed.arrayrecord", slow=0.2)
    end = time.monotonic() + 300
    while len(shards(folder, "killed")) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    text = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, text
    left = shards(folder, "killed")
    assert 2 <= len(left) < 5 and not (folder / "killed.json").exists()
    text = start(folder, folder / "killed.arrayrecord").communicate(timeout=300)[0]
    assert "ended" in text and f"{len(left)} are there already" in text and "1 of 18 images are broken" in text
    assert shards(folder, "killed") == shards(folder, "whole")
    assert not list(folder.glob("*.partial"))
    manifests = [(folder / f"{stem}.json").read_text().replace(stem, "") for stem in ("killed", "whole")]
    assert manifests[0] == manifests[1]
    codes = open_codes(folder / "killed.arrayrecord")
    assert [one.id for one in codes] == [f"{k:02d}.png" for k in range(IMAGES) if k != 7]
    assert [one["id"] for one in codes.broken] == ["07.png"]


def test_started_again_it_does_nothing(folder, capsys):
    before = {file: file.stat().st_mtime_ns for file in folder.glob("whole-*.arrayrecord")}
    tokenize(
        str(folder / "model"), [str(folder / "images")], str(folder / "whole.arrayrecord"), size=16, shard_images=4
    )
    assert "5 are there already" in capsys.readouterr().err
    assert len(before) == 5 and before == {file: file.stat().st_mtime_ns for file in before}


def both(folder, out, slow=0.0):
    """Two processes that share the shards."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    known = {"VLM_JAX_COORDINATOR": address, "VLM_JAX_PROCESSES": "2"}
    return [start(folder, out, slow, **known, VLM_JAX_PROCESS=str(index)) for index in range(2)]


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(folder):
    """The other ends too, with a sentence, and the shards of both stay; two new processes make the rest."""
    first, second = both(folder, folder / "two.arrayrecord", slow=0.2)
    try:
        end = time.monotonic() + 300
        while len(shards(folder, "two")) < 2 and first.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        second.send_signal(signal.SIGKILL)
        said = first.communicate(timeout=300)[0]
    finally:
        first.kill()
        second.kill()
    assert first.returncode not in (0, -signal.SIGKILL) and "process 1" in said, said
    left = shards(folder, "two")
    assert 2 <= len(left) < 5 and not (folder / "two.json").exists()
    pair = both(folder, folder / "two.arrayrecord")
    try:
        words = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert all("ended" in text for text in words), words
    assert f"{len(left)} are there already" in words[0] and "1 of 18 images are broken" in words[0], words[0]
    assert shards(folder, "two") == shards(folder, "whole")
    assert (folder / "two.json").read_text().replace("two", "") == (folder / "whole.json").read_text().replace(
        "whole", ""
    )
