"""Several processes are one run: equal losses, own rows, one checkpoint; a lost one ends all with a sentence, and any number goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.parallel import hosts, peers
from vlm_jax.train.metrics import read_metrics, slow_words, straggler

HERE = Path(__file__).parent
STEPS, ROWS = 10, 4  # of pod_recipe.py


class Pod:
    """The command `train` in `count` processes of one device that lie on this machine."""

    def __init__(self, folder: Path, run: Path, count: int, slow: dict[int, float] | float = 0.0):
        folder.mkdir()
        self.folder, self.run, self.processes = folder, run, []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(run.parent / "compiled")}
        for index in range(count):
            seconds = slow.get(index, 0.0) if isinstance(slow, dict) else slow
            command = [sys.executable, str(HERE / "run_pod.py"), str(seconds), str(folder)]
            command += [f"--config={HERE / 'pod_recipe.py'}", f"--config.output={run}", "--stopped_code=75"]
            command += [f"--coordinator={address}", f"--process_id={index}", f"--process_count={count}"] * (count > 1)
            with open(folder / f"said.{index}", "w") as said:
                self.processes.append(subprocess.Popen(command, env=env, stdout=said, stderr=said))

    def wait_for_step(self, step: int, seconds: float = 600) -> None:
        """Until the log shows `step`."""
        end = time.monotonic() + seconds
        while not any(line["step"] >= step for line in read_metrics(self.run)):
            if time.monotonic() > end or any(p.poll() is not None for p in self.processes):
                said = self.said()
                self.codes(1)
                pytest.fail(f"step {step} was not reached: {said}")
            time.sleep(0.02)

    def codes(self, seconds: float = 600) -> list[int]:
        """Exit codes; what still runs after `seconds` is killed and shows as -9."""
        end = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        for process in self.processes:
            process.kill()
        return [process.wait() for process in self.processes]

    def said(self) -> list[str]:
        """What each process printed."""
        return [(self.folder / f"said.{index}").read_text() for index in range(len(self.processes))]

    def rows(self, index: int) -> dict[int, list[int]]:
        """{step: checksums of the rows} that a process read."""
        lines = map(json.loads, (self.folder / f"rows.{index}.jsonl").read_text().splitlines())
        return {line["step"]: line["rows"] for line in lines}


def curve(run):
    return np.asarray([[m["step"], m["loss"], m["grad_norm"], m["tokens"], m["views"]] for m in read_metrics(run)])


def saved(run):
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    pod = Pod(folder / "pod", folder / "run", 1)
    assert pod.codes() == [0], pod.said()
    assert curve(pod.run)[:, 0].tolist() == list(range(1, STEPS + 1))
    return pod


@pytest.fixture(scope="module")
def story(alone, tmp_path_factory):
    """Four processes, one of them killed; then two, one of them told to stop; then one to the end. (The pods, their exit codes,
    steps on disk after each, the log after each.)"""
    run = alone.run.parent / "story"
    pods, codes, steps, logs = [], [], [], []

    def note(pod, seconds):
        pods.append(pod)
        codes.append(pod.codes(seconds))
        steps.append(saved(run))
        logs.append(read_metrics(run))

    four = Pod(run.parent / "four", run, 4, {1: 0.3})
    four.wait_for_step(4)
    four.processes[3].send_signal(signal.SIGKILL)
    note(four, 100)  # less than jax's own limit
    two = Pod(run.parent / "two", run, 2, {1: 0.5})
    two.wait_for_step(6)
    two.processes[1].send_signal(signal.SIGTERM)
    note(two, 600)
    note(Pod(run.parent / "last", run, 1), 600)
    return pods, codes, steps, logs


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_sentence(story):
    pods, codes, steps, _ = story
    assert codes[0] == [75, 75, 75, -9], pods[0].said()
    for said in pods[0].said()[:3]:
        sentences = [line for line in said.splitlines() if line.startswith("vlm_jax: ")]
        assert len(sentences) == 1 and "Traceback" not in said and "Check failure" not in said, said
        assert "process 3 of 4 (host " in sentences[0] and "ended without a word: it was killed" in sentences[0]
        assert sentences[0].endswith(
            "start the same command again in all processes, and the run goes on from its last checkpoint"
        )
    assert 3 in steps[0], "what was saved before is intact"


@pytest.mark.slow
def test_a_stop_signal_to_one_process_saves_and_stops_all(story):
    pods, codes, steps, _ = story
    assert codes[1] == [75, 75], pods[1].said()
    assert (
        6 <= max(steps[1]) < STEPS
        and f"stopped by SIGTERM: step {max(steps[1])} of {STEPS} is saved" in pods[1].said()[0]
    )


@pytest.mark.slow
def test_any_number_of_processes_goes_on_with_the_same_losses(story, alone):
    """Four, two and one add in other orders: float32 rounding apart, what each computes is the same."""
    pods, codes, steps, _ = story
    assert codes[2] == [0], pods[2].said()
    assert f"the checkpoint of step {max(steps[0])} is read" in pods[1].said()[0]
    assert f"the checkpoint of step {max(steps[1])} is read" in pods[2].said()[0]
    np.testing.assert_allclose(curve(pods[2].run), curve(alone.run), rtol=1e-5)


@pytest.mark.slow
def test_each_process_reads_only_its_rows(story, alone):
    pods, _, _, _ = story
    whole = alone.rows(0)
    for pod, count in zip(pods, (4, 2, 1)):
        read = [pod.rows(index) for index in range(count)]
        for step in set.intersection(*map(set, read)):
            assert [len(rows[step]) for rows in read] == [ROWS // count] * count
            assert sum((rows[step] for rows in read), []) == whole[step]


@pytest.mark.slow
def test_every_process_writes_its_part_of_a_checkpoint(alone, story):
    _, _, _, logs = story
    assert {p.name for p in (alone.run / "checkpoints").rglob("ocdbt.process_*")} == {"ocdbt.process_0"}
    of_two = {p.name for p in (alone.run.parent / "story" / "checkpoints").rglob("ocdbt.process_*")}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= of_two


@pytest.mark.slow
def test_the_log_names_the_slowest_process(alone, story):
    _, _, _, logs = story
    named = [(line["slowest_process"], line["straggler"]) for line in logs[1] if "straggler" in line]
    assert named and all(process in range(4) and 0 <= share <= 1 for process, share in named), named
    assert not any("straggler" in line for line in read_metrics(alone.run))
    assert ", process " in story[0][1].said()[0], "and the progress line says it"


def test_the_straggler_is_the_one_that_waits_least():
    assert straggler({0: 0.1}, 1.0) == straggler({}, 1.0) == {}
    found = straggler({0: 0.1, 1: 0.1, 2: 0.3, 3: 0.2}, 0.5)
    assert found == {"slowest_process": 2, "straggler": pytest.approx(0.4)}
    assert slow_words(found) == ", process 2 +40%" and slow_words({"loss": 1.0}) == ""


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(tmp_path):
    """A sum of two does not depend on its order, so a restart in as many processes is exact."""
    whole = Pod(tmp_path / "a", tmp_path / "whole", 2)
    assert whole.codes() == [0, 0], whole.said()
    killed = Pod(tmp_path / "b", tmp_path / "killed", 2, 0.3)
    killed.wait_for_step(5)
    killed.processes[0].send_signal(signal.SIGKILL)
    assert killed.codes(100) == [-9, 75] and "process 0 of 2" in killed.said()[1], killed.said()
    again = Pod(tmp_path / "c", tmp_path / "killed", 2)
    assert again.codes() == [0, 0], again.said()
    assert (curve(again.run) == curve(whole.run)).all()


class Told:
    """Three processes' watches in this process; `told` are (process, sentence, code)."""

    def __init__(self, silence=30.0):
        listener, offer = peers.listen("127.0.0.1")
        self.told, self.offer = [], offer

        def lost(index):
            return lambda sentence, code: self.told.append((index, sentence, code))

        self.watches = [peers.Peers(0, 3, silence, offer.token, listener, lost=lost(0))]
        self.watches[0].start()
        self.lines = [peers.call(offer, index) for index in (1, 2)]
        self.watches += [peers.Peers(k, 3, silence, offer.token, None, self.lines[k - 1], lost(k)) for k in (1, 2)]

    def until(self, count, seconds=20):
        """The first `count` of `told`, in order of process."""
        end = time.monotonic() + seconds
        while len(self.told) < count and time.monotonic() < end:
            time.sleep(0.01)
        return sorted(self.told)


def test_a_closed_line_is_told_to_all():
    three = Told()
    three.watches[1].start()
    three.lines[1].socket.close()  # process 2 is killed
    (one, first, code), (other, second, _) = three.until(2)
    assert (one, other, code) == (0, 1, peers.LOST) and first == second
    assert first.startswith("process 2 of 3 (host ") and "killed" in first


def test_an_error_of_one_is_the_end_of_all():
    three = Told()
    for watch in three.watches[1:]:
        watch.start()
    three.watches[1].end("data.path=x does not exist", 2)
    assert [(k, code) for k, _, code in three.until(2)] == [(0, 2), (2, 2)]
    assert all("process 1 (host " in s and s.endswith("failed: data.path=x does not exist") for _, s, _ in three.told)


def test_silence_is_an_end(monkeypatch):
    monkeypatch.setattr(peers, "TICK", 0.05)
    three = Told(silence=1.0)
    three.watches[1].start()  # process 2 says nothing
    found = three.until(2)
    assert [k for k, _, _ in found] == [0, 1] and all("process 2 of 3" in s and "for 1 s" in s for _, s, _ in found)


def test_all_end_together_and_share_numbers(monkeypatch):
    monkeypatch.setattr(peers, "TICK", 0.05)
    three = Told()
    stranger = peers.Line(socket.create_connection(("127.0.0.1", three.offer.port)))
    stranger.send(token="guess", process=1, host="elsewhere")
    for index, watch in enumerate(three.watches):
        watch.share(0.5 * index)
        watch.start() if index else None
    end = time.monotonic() + 20
    while len(three.watches[0].shared()) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert three.watches[0].shared() == {0: 0.0, 1: 0.5, 2: 1.0} and three.watches[1].shared() == {}
    assert stranger.receive() is None, "a line without the token is closed"
    three.watches[1]._lines[0].send(ended="", code=0)  # what `end` says before it waits
    three.watches[2]._lines[0].send(ended="", code=0)
    for watch in three.watches:
        watch.end()
    assert not three.told


JOIN = "from vlm_jax.parallel import hosts; hosts.initialise({!r}, 2, {}, 1.0)"


@pytest.mark.parametrize(
    "process, sentence",
    [
        (1, "the coordinator 127.0.0.1:{} could not be reached within 1 s (Connection refused): start process 0 there"),
        (
            0,
            "the processes did not come together within 1 s: start all 2 processes, each --process_id from 0 to 1 once",
        ),
    ],
)
def test_nobody_there(process, sentence):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = JOIN.format(f"127.0.0.1:{port}", process)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == hosts.peers.LOST and f"vlm_jax: {sentence.format(port)}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "--connect_seconds" in done.stderr
