"""What stops a run: killed, preempted, a full disk, another process gone. It goes on as if nothing had been."""

import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = "--num-experts 4 --d-ff 8 --d-model 16 --num-layers 1 --num-heads 2 --context 8 --batch-size 8 --log-every 1"
FLAGS += " --eval-every 100000 --strategy random_boost --save-every 10 --steps 300"
KILLS = 20


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Programs that were compiled once, for all processes."""
    return tmp_path_factory.mktemp("compiled")


def start(folder, compiled, *flags, devices=2):
    """A training process, whose log and checkpoints are in the folder."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "examples.pod.train", *FLAGS.split(), *flags]
    command += ["--log", str(folder / "log.jsonl"), "--checkpoints", str(folder / "checkpoints")]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(*jobs, timeout=600):
    """Return codes, and what was written."""
    with futures.ThreadPoolExecutor() as threads:  # all at once: a full pipe stops a job, and with it the others
        outputs = list(threads.map(lambda job: "".join(job.communicate(timeout=timeout)), jobs))
    return [job.returncode for job in jobs], "\n".join(outputs)


def logged(folder):
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}") and '"loss"' in line]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


def wait_for_step(folder, step, job):
    """Until the log has come so far."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in logged(folder)):
        assert job.poll() is None, finish(job)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def result(folder):
    """The metrics of every step, and the checksum of the last checkpoint: of parameters and optimizer state."""
    step = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    config = json.loads((folder / "checkpoints" / str(step) / "config" / "metadata").read_text())
    return step, config["checksum"], logged(folder)


@pytest.fixture(scope="module")
def left_alone(compiled, tmp_path_factory):
    """The result of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("alone")
    codes, output = finish(start(folder, compiled))
    assert codes == [0], output
    return result(folder)


def went_on_from(output):
    """The step that a run went on from."""
    (step,) = re.findall(r"resuming from step (\d+)", output)
    return int(step)


def test_killed_at_random_moments(compiled, left_alone, tmp_path):
    """In training, while a checkpoint is written, or at the start, if the last one came that far before it was dead."""
    rng = random.Random(0)
    for number, step in enumerate(sorted(rng.sample(range(1, 290), KILLS)), start=1):
        job = start(tmp_path, compiled)
        wait_for_step(tmp_path, step, job)
        time.sleep(rng.uniform(0, 0.03))
        assert job.poll() is None, f"it was too late for kill {number}"
        job.kill()
        finish(job)
    codes, output = finish(start(tmp_path, compiled))
    assert codes == [0], output
    assert went_on_from(output) >= 200
    assert result(tmp_path) == left_alone


def test_preempted(compiled, left_alone, tmp_path):
    job = start(tmp_path, compiled)
    wait_for_step(tmp_path, 33, job)
    job.send_signal(signal.SIGTERM)
    codes, output = finish(job)
    assert codes == [0], output
    assert "preempted: saved step" in output
    step = result(tmp_path)[0]
    assert logged(tmp_path)[-1]["step"] == step
    codes, output = finish(start(tmp_path, compiled))
    assert codes == [0], output
    assert went_on_from(output) == step
    assert result(tmp_path) == left_alone


def test_two_processes_go_on_where_one_was(compiled, left_alone, tmp_path):
    job = start(tmp_path, compiled)
    wait_for_step(tmp_path, 33, job)
    job.send_signal(signal.SIGTERM)
    finish(job)
    saved = result(tmp_path)[0]
    codes, output = finish(*two(tmp_path, compiled, "--fsdp", "2"))
    assert codes == [0, 0], output
    assert re.findall(r"resuming from step (\d+)", output) == [str(saved)] * 2
    assert abs(result(tmp_path)[2][-1]["loss"] - left_alone[2][-1]["loss"]) < 1e-3


def truncate(folder):
    """Halves all data that OCDBT, Orbax's storage, keeps below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_checkpoint(compiled, left_alone, tmp_path):
    job = start(tmp_path, compiled)
    wait_for_step(tmp_path, 55, job)
    job.kill()
    finish(job)
    newest = max((p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    truncate(newest / "state")
    codes, output = finish(start(tmp_path, compiled))
    assert codes == [0], output
    assert f"The checkpoint of step {newest.name}" in output
    assert "trying the one before" in output
    assert went_on_from(output) == int(newest.name) - 10
    assert result(tmp_path) == left_alone


def test_a_full_disk(compiled, left_alone, tmp_path):
    """No file may be larger than a kilobyte, as far as this process goes: an error, and what was saved is whole."""
    job = start(tmp_path, compiled)
    wait_for_step(tmp_path, 25, job)
    job.send_signal(signal.SIGTERM)
    finish(job)
    before = result(tmp_path)
    job = start(tmp_path, compiled, "--log-every", "1000")
    resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (1024, 1024))  # long before the first file is written
    codes, output = finish(job)
    assert went_on_from(output) == before[0]
    assert codes == [1], output
    assert "File too large" in output.splitlines()[-1], output  # after a traceback of Orbax's thread
    assert output.splitlines()[-1].startswith("pod.train: "), output
    assert result(tmp_path) == before
    codes, output = finish(start(tmp_path, compiled))
    assert codes == [0], output
    assert result(tmp_path) == left_alone


def two(folder, compiled, *flags):
    """Two processes of one run, with one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--coordinator", coordinator, "--processes", "2", "--timeout", "10", *flags)
    return [start(folder, compiled, *flags, "--process", str(i), devices=1) for i in range(2)]


def assert_ends_as(folder, left_alone, output):
    """As the run that was left alone, but for rounding, as sums are made in another order."""
    assert went_on_from(output) >= 10
    step, _, lines = result(folder)
    assert step == 300
    assert [line["step"] for line in lines] == list(range(1, 301))
    assert abs(lines[-1]["loss"] - left_alone[2][-1]["loss"]) < 1e-3


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_processes_killed(killed, compiled, left_alone, tmp_path):
    """The other ends by itself, with an error, in less than a minute. One process goes on where two were."""
    jobs = two(tmp_path, compiled)
    wait_for_step(tmp_path, 20, jobs[0])
    jobs[killed].kill()
    began = time.monotonic()
    codes, output = finish(jobs[1 - killed], timeout=120)
    assert codes[0] != 0
    assert time.monotonic() - began < 60
    assert "another task died" in output or "leader task" in output, output
    finish(jobs[killed])
    codes, output = finish(start(tmp_path, compiled))
    assert codes == [0], output
    assert_ends_as(tmp_path, left_alone, output)


def test_a_checkpoint_of_which_one_process_cannot_read_its_part(compiled, left_alone, tmp_path):
    """Both use the one before, and neither waits for the other."""
    jobs = two(tmp_path, compiled, "--fsdp", "2")
    wait_for_step(tmp_path, 45, jobs[0])
    jobs[1].send_signal(signal.SIGTERM)
    codes, output = finish(*jobs)
    assert codes == [0, 0], output
    newest = result(tmp_path)[0]
    truncate(tmp_path / "checkpoints" / str(newest) / "state" / "ocdbt.process_1")
    codes, output = finish(*two(tmp_path, compiled, "--fsdp", "2"))
    assert codes == [0, 0], output
    assert f"The checkpoint of step {newest}" in output
    (first, second) = map(int, re.findall(r"resuming from step (\d+)", output))
    assert first == second < newest
    step, _, lines = result(tmp_path)
    assert step == 300
    assert abs(lines[-1]["loss"] - left_alone[2][-1]["loss"]) < 1e-3


def test_one_of_two_processes_preempted(compiled, tmp_path):
    jobs = two(tmp_path, compiled)
    wait_for_step(tmp_path, 20, jobs[0])
    jobs[1].send_signal(signal.SIGTERM)
    codes, output = finish(*jobs)
    assert codes == [0, 0], output
    assert output.count("preempted: saved step") == 2
    assert logged(tmp_path)[-1]["step"] == result(tmp_path)[0] < 300


def test_a_process_that_does_not_come(compiled, tmp_path):
    """The coordinator ends, and says who is missing."""
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--coordinator", coordinator, "--processes", "2", "--process", "0", "--timeout", "5")
    codes, output = finish(start(tmp_path, compiled, *flags))
    assert codes[0] != 0
    assert time.monotonic() - began < 60
    assert "DEADLINE_EXCEEDED" in output
    assert not (tmp_path / "checkpoints").exists()


def test_a_coordinator_that_is_not_there(compiled, tmp_path):
    began = time.monotonic()
    flags = ("--coordinator", "127.0.0.1:9", "--processes", "2", "--process", "1", "--timeout", "5")
    codes, output = finish(start(tmp_path, compiled, *flags))
    assert codes[0] != 0
    assert time.monotonic() - began < 60
    assert "127.0.0.1:9" in output
    assert not (tmp_path / "checkpoints").exists()
