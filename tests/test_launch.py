"""The launch scripts say what they would run, refuse what is missing, and pass the checkers of their languages."""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
TRAIN = ["--", "train", "--config", "configs/llava15.py:7b,stage1", "--config.data.path=('a b.json',)"]


def dry(script: str, *arguments: str) -> list[list[str]]:
    """The commands that a script would run, as words."""
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments, "--dry-run", *TRAIN], capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_a_tpu_vm_is_made_filled_and_started():
    create, archive, copy, run = dry("tpu_vm.sh", "--name", "pod", "--zone", "z", "--type", "v5litepod-16")
    assert (
        create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod"]
        and "--version=v2-alpha-tpuv5-lite" in create
    )
    assert archive[:2] == ["git", "archive"] and copy[4] == "scp" and copy[6] == "pod:vlm_jax.tar.gz"
    remote = run[-1].removeprefix("--command=")
    # the command arrives on the host as it was typed, quotes and all
    assert shlex.split(remote.split("launch/run.sh ")[1]) == TRAIN[1:]


def test_a_workload_of_two_slices():
    (run,) = dry(
        "xpk.sh", "--cluster", "c", "--workload", "w", "--type", "v5litepod-256", "--image", "i", "--slices", "2"
    )
    assert run[:3] == ["xpk", "workload", "create"] and {"--num-slices=2", "--cluster=c", "--max-restarts=3"} <= set(
        run
    )
    assert shlex.split(run[-1].split("launch/run.sh ")[1])[: len(TRAIN) - 1] == TRAIN[1:]


def test_a_slurm_job_runs_a_process_for_every_gpu():
    install, step = dry("slurm.sbatch")
    assert install[-2:] == ["launch/run.sh", "--help"] and step[0] == "srun"
    assert step[-6:] == [*TRAIN[1:], "--stopped_code", "75"]


def stand_in(folder: Path, **bodies: str) -> None:
    """Put scripts of these names and bodies into `folder`, for programs that are not here."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    "code, restarts, again",
    [(0, 0, False), (1, 0, False), (75, 30, True), (137, 0, True), (137, 20, False)],
    ids=["done", "error", "saved", "lost", "lost too often"],
)
def test_a_slurm_job_is_queued_again_when_that_helps(tmp_path, code, restarts, again):
    stand_in(tmp_path, env="", srun=f"exit {code}", scontrol='echo "$@"')
    place = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), *TRAIN], capture_output=True, text=True, env=place)
    assert done.returncode == code
    assert done.stdout.splitlines()[-1:] == ["requeue 7"] if again else "requeue" not in done.stdout


def test_a_slurm_job_that_is_preempted_waits_for_the_save(tmp_path):
    saves = f"trap 'sleep 0.3; exit 75' TERM; echo $$ > {tmp_path}/pid; for i in $(seq 100); do sleep 0.1; done"
    stand_in(tmp_path, env="", srun=saves, scancel=f"kill -TERM $(cat {tmp_path}/pid)", scontrol='echo "$@"')
    place = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), *TRAIN], stdout=subprocess.PIPE, text=True, env=place)
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    job.terminate()
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 75 and said.splitlines()[-1] == "requeue 7"


@pytest.mark.parametrize(
    "script, arguments, sentence",
    [
        ("tpu_vm.sh", ["--zone", "z", "--type", "v5p-8", *TRAIN], "tpu_vm.sh: give --name"),
        ("tpu_vm.sh", ["--name", "a", "--zone", "z", "--type", "v1-8", *TRAIN], "--type v1-8 is unknown"),
        ("xpk.sh", ["--cluster", "c", "--colour", "red"], "unknown flag --colour"),
        (
            "xpk.sh",
            ["--cluster", "c", "--workload", "w", "--type", "v5p-8", "--image", "i"],
            "give the command behind --",
        ),
        ("slurm.sbatch", ["train"], "the command of vlm_jax stands behind --"),
    ],
)
def test_what_is_missing_is_named(script, arguments, sentence):
    done = subprocess.run(["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and sentence in done.stderr and not done.stdout


def test_scripts_pass_shellcheck():
    checker = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if not checker:
        pytest.skip("shellcheck is not installed: extra test")
    scripts = sorted(str(p) for p in [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
    done = subprocess.run([checker, "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_manifest_is_what_kubernetes_takes():
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: extra test")
    import yaml

    service, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    for resource in (service, job):
        validate.validate(resource, "1.31", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] and pod["subdomain"] == service["metadata"]["name"]
    assert "--stopped_code=75" in pod["containers"][0]["args"]  # a pod that ends with 0 would count as done
