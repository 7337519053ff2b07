"""The launch scripts say what they would run, refuse what is missing, and pass the checkers of their languages."""

import shlex
import shutil
import subprocess
import sys
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
