"""SIGTERM to a job, and what it then asks of SLURM; a stand-in for scontrol says what a controller would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from metacanary.interruption import Stopped

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow" / "scripts"))

import _checkpoints
import _job
import _stop

SHOWN = "JobId=7 JobName=1234-uuid Comment={comment} JobState={state} Reason={reason} Dependency=(null)"
REQUEUED = "SLURM runs job 7 again, which goes on"


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Puts a scontrol in front that knows one job, 7; the fixture says of what state, and tells what was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def answer(state="RUNNING", comment="rule_train_wildcards_digits", *, reason="None", requeue=0, first=""):
        shown = SHOWN.format(state=state, comment=comment, reason=reason)
        script = f'#!/bin/sh\n{first}\necho "$*" >>{folder}/asked\n'
        script += f"[ $1 = requeue ] && exit {requeue}\necho '{shown}'\n"
        (folder / "scontrol").write_text(script, encoding="utf-8")
        (folder / "scontrol").chmod(0o755)

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return SimpleNamespace(answer=answer, asked=lambda: (folder / "asked").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(("state", "reason"), [("RUNNING", "None"), ("COMPLETING", "TimeLimit")])
def test_run_again_requeues_a_job_whose_time_is_over(scontrol, state, reason):
    scontrol.answer(state, reason=reason)
    assert _stop.run_again("train") == REQUEUED
    assert scontrol.asked() == ["--oneliner show job 7", "requeue 7"]


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED", "PENDING", "COMPLETING", "FAILED"])
def test_run_again_leaves_a_job_that_somebody_ended(scontrol, state):
    scontrol.answer(state)
    assert _stop.run_again("train") == f"SLURM says {state}; the next attempt goes on"
    assert scontrol.asked() == ["--oneliner show job 7"]


@pytest.mark.parametrize("comment", ["", "my-notebook", "rule_training_wildcards_x", "rule_optimize"])
def test_run_again_leaves_a_job_that_is_not_its_own(scontrol, comment):
    """As where a local Snakemake runs in somebody's batch job."""
    scontrol.answer(comment=comment)
    assert _stop.run_again("train") == "the next attempt goes on"
    assert scontrol.asked() == ["--oneliner show job 7"]


def test_run_again_knows_a_rule_without_wildcards(scontrol):
    scontrol.answer(comment="rule_train")
    assert _stop.run_again("train") == REQUEUED


def test_run_again_outlives_another_sigterm(scontrol):
    """At the limit SLURM sends it to all processes of the job, more than once."""
    scontrol.answer(first="kill -TERM $$")
    assert _stop.run_again("train") == REQUEUED


def test_run_again_without_slurm_asks_nobody(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert _stop.run_again("train") == "the next attempt goes on"


def test_run_again_leaves_it_to_retries_if_slurm_does_not_answer(scontrol, monkeypatch):
    scontrol.answer(requeue=1)
    assert "one of Snakemake's retries goes on" in _stop.run_again("train")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "one of Snakemake's retries goes on" in _stop.run_again("train")


def test_termination_is_requested_by_sigterm_alone(tmp_path):
    """In a process of its own, whose SIGTERM is not that of the tests."""
    script = (
        "import os, signal, _stop\n"
        "termination = _stop.Termination().listen()\n"
        "assert not termination() and termination.seconds() == 0\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert termination()\n"
        "assert 0 <= termination.seconds() < 5\n"
    )
    path = Path(_stop.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def fake(tmp_path):
    """The object that Snakemake puts into the script of a job with checkpoints."""
    params = SimpleNamespace(settings={}, code="s", config_digest="d", checkpoints=str(tmp_path / "checkpoints"))
    return SimpleNamespace(input=None, output=None, threads=1, log=[tmp_path / "log"], params=params, rule="train")


def attempt_that_is_stopped(tmp_path, attempt):
    with _job.running(fake(tmp_path)) as job:
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        print(f"attempt {attempt}")
        raise Stopped("stopped after step 3 of 8")


def progress_that_is_stopped():
    with _job.progress(10, "step", "train", initial=4) as bar:
        bar.update(3)
        raise Stopped


def test_running_ends_a_stopped_job_with_an_error_and_keeps_its_log(tmp_path, monkeypatch, capsys):
    for name in ("XLA_FLAGS", "NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for attempt in (1, 2):
        with pytest.raises(SystemExit) as ended:
            attempt_that_is_stopped(tmp_path, attempt)
        assert ended.value.code == "the next attempt goes on"
        (tmp_path / "log").unlink()  # as Snakemake does before a job
    with _job.running(fake(tmp_path)) as job:
        print("attempt 3")
        job.finish_checkpoints()
    assert [path.name for path in job.checkpoints.iterdir()] == ["finished"]
    _checkpoints.discard_finished(tmp_path / "checkpoints")
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("attempt")] == ["attempt 1", "attempt 2", "attempt 3"]
    assert lines.count("stopped after step 3 of 8; checkpoint written 0.0 s after SIGTERM") == 2
    assert list((tmp_path / "checkpoints").rglob("*")) == []
    assert "attempt 3" in capsys.readouterr().out


def test_discard_finished_leaves_what_is_under_way(tmp_path):
    """As where one target succeeds while the jobs of others were ended early."""
    done, other = tmp_path / "models/digits/0/key", tmp_path / "models/digits/1/key"
    for folder in (done, other):
        folder.mkdir(parents=True)
        (folder / "run0.npz").touch()
        _checkpoints.earlier_log(folder.parent).touch()
    _checkpoints.mark_finished(done)
    _checkpoints.discard_finished(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["models/digits/1/earlier.log", "models/digits/1/key/run0.npz"]
    _checkpoints.discard_finished(tmp_path / "nothing")


def test_progress_says_what_was_done_in_this_attempt_however_it_ends(capsys):
    with pytest.raises(Stopped):
        progress_that_is_stopped()
    assert capsys.readouterr().out == "train: 3 of 10 steps done in this attempt\n"


def test_a_shell_with_the_workflows_prefix_outlives_sigterm(root):
    """Older shells stay in memory beside the script; SLURM sends SIGTERM to both."""
    common = (root / "workflow/rules/common.smk").read_text(encoding="utf-8")
    (prefix,) = [line.split('"')[1] for line in common.splitlines() if line.startswith("shell.prefix")]
    script = "import signal, time; signal.signal(15, lambda *_: exit(3)); print('ready', flush=True); time.sleep(60)"
    command = f'set -euo pipefail; {prefix}{sys.executable} -c "{script}"; exit $?'  # not the last: no exec
    shell = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert shell.stdout.readline() == "ready\n"
    os.killpg(shell.pid, signal.SIGTERM)
    began = time.monotonic()
    assert shell.wait(30) == 3
    assert time.monotonic() - began < 30
    shell.stdout.close()
