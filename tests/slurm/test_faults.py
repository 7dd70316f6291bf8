"""Everything that goes wrong on a cluster, done to the pipeline: afterwards its table has the very same bytes.

Each fault has a cluster of its own. All run at a time, a few side by side, since they mostly wait.
"""

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, wait_for
from workflows import CONFIG, Workflow

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]

SIDE_BY_SIDE = 4
OPTIMIZE, TRAIN = "optimize_canaries", "train_audit_models"
CANARIES, CELL = "canaries/digits/metagradient", "digits/metagradient/sgd/epsinf"
TARGETS = {
    OPTIMIZE: f"results/faults/{CANARIES}/canaries.npz",
    TRAIN: f"results/faults/models/{CELL}/block0.npz",
}
# The first checkpoint of each: a finished metastep, a finished run.
CHECKPOINTS = {
    OPTIMIZE: "results/faults/checkpoints/canaries/**/state.npz",
    TRAIN: "results/faults/checkpoints/models/**/run0.npz",
}
LOGS = {
    OPTIMIZE: "results/faults/logs/optimize_canaries/digits/metagradient.log",
    TRAIN: f"results/faults/logs/train_audit_models/{CELL}/block0.log",
}
Row = dict[str, str]


@dataclass(frozen=True)
class Victim:
    """A job that something happens to: the workflow that it belongs to, and its rule."""

    cluster: Cluster
    folder: Path
    rule: str

    def workflow(self, **changes: Any) -> Workflow:
        """The workflow, up to this job; what comes before it was made undisturbed."""
        return Workflow(self.cluster, self.folder, target=TARGETS[self.rule], **changes)


def hit(run: Workflow, rule: str) -> str:
    """Waits until the job of a rule has written its first checkpoint and goes on; returns its number."""
    run.wait_for_file(CHECKPOINTS[rule])
    return run.wait_for_job(rule, "RUNNING").id


def done_in_attempts(run: Workflow, rule: str) -> tuple[list[int], int]:
    """The steps that each attempt at a job did, of those that came to say so; and the steps there are to do."""
    found = re.findall(r": (\d+) of (\d+) steps done in this attempt", log_of(run, rule))
    return [int(done) for done, _ in found], int(found[-1][1])


def stopped(run: Workflow, rule: str, happened: str) -> Row:
    """The row of a fault whose job was given the time to write its checkpoint: no step is done twice."""
    done, total = done_in_attempts(run, rule)
    assert len(done) >= 2, done
    assert sum(done) == total, (done, total)
    found = re.findall(r"checkpoint written ([\d.]+) s after SIGTERM", log_of(run, rule))
    seconds = [float(text) for text in found]
    assert 1 <= len(seconds) < len(done)
    assert max(seconds) < 20
    repeated = f"none: {' + '.join(map(str, done))} = {total} steps"
    return row(rule, f"{happened}; checkpoint {max(seconds):.1f} s after SIGTERM", repeated)


def killed(run: Workflow, rule: str, happened: str, since_checkpoint: float) -> Row:
    """The row of a fault whose job was killed: what a checkpoint held is not done again."""
    done, total = done_in_attempts(run, rule)
    assert 0 < done[-1] < total, (done, total)
    repeated = f"{since_checkpoint:.1f} s since the checkpoint; the new attempt did {done[-1]} of {total} steps"
    return row(rule, happened, repeated)


def undisturbed_job(run: Workflow, rule: str, happened: str) -> Row:
    """The row of a fault that the job itself took no notice of."""
    done, total = done_in_attempts(run, rule)
    assert done == [total]
    return row(rule, happened, f"none: one attempt did all {total} steps")


def row(job: str, happened: str, repeated: str) -> Row:
    """A row but for the name of the fault and whether the result is identical."""
    return {"job": job, "what_happened": happened, "work_repeated": repeated}


def log_of(run: Workflow, rule: str) -> str:
    """The log of a job so far."""
    path = run.folder / LOGS[rule]
    return path.read_text(encoding="utf-8") if path.exists() else ""


@contextlib.contextmanager
def explained(cluster: Cluster) -> Iterator[None]:
    """Adds to an error what the cluster says."""
    try:
        yield
    except Exception as error:
        error.add_note(cluster.describe())
        raise


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small disk of its own; skips the test where this process may make none."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount a disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def age(run: Workflow, rule: str) -> float:
    """Seconds since the newest checkpoint of a job was written."""
    files = list(run.folder.glob(f"{Path(CHECKPOINTS[rule]).parent}/*.npz"))
    return time.time() - max(path.stat().st_mtime for path in files)


def time_limit(victim: Victim) -> Row:
    """A job that needs more than its partition allows, one minute, finishes by itself."""
    # 120 s in the profile, more than this limit.
    return limited(victim, "SIGTERM before the limit of a minute", "'--signal=TERM@5 --open-mode=append'")


def hard_time_limit(victim: Victim) -> Row:
    """The same without a warning before it: SLURM's own SIGTERM, KillWait before SIGKILL, is enough."""
    return limited(victim, "SIGTERM at the limit of a minute", "'--open-mode=append'")


def limited(victim: Victim, happened: str, extra: str) -> Row:
    """Runs the longer job in the partition that has no time for it."""
    short = {"slurm_partition": "short", "runtime": "min(720 * attempt, 1)", "slurm_extra": extra}
    # An attempt whose start takes half of its minute, on a busy machine, ends before it has a step to keep: a retry.
    run = victim.workflow(config=victim.folder / "config.yaml", rules={victim.rule: short}, retries=20).start()
    assert run.finish() == 0, run.text()
    restarts = log_of(run, victim.rule).count("SystemExit: SLURM runs job")
    assert restarts >= 1
    return stopped(run, victim.rule, f"{happened}; SLURM ran the job again {restarts} time(s)")


def nothing(victim: Victim) -> Row:
    """The whole pipeline, as it is meant to run; squeue tells rule and wildcards, GPU jobs ask for one by its model."""
    run = Workflow(victim.cluster, victim.folder, rules={TRAIN: {"gpu_model": "a100"}}).start()
    assert run.finish() == 0, run.text()
    jobs = {job.comment: victim.cluster.show(job.id) for job in victim.cluster.jobs()}
    cell = "digits_metagradient_sgd_inf"
    assert set(jobs) == {
        f"rule_{OPTIMIZE}_wildcards_digits_metagradient",
        f"rule_{TRAIN}_wildcards_{cell}_0",
        f"rule_score_membership_wildcards_{cell}_0",
        f"rule_compute_epsilon_wildcards_{cell}",
        "rule_collect_epsilon",
    }
    asked = {comment.split("_wildcards_")[0]: shown.get("TresPerJob") for comment, shown in jobs.items()}
    gpus = {f"rule_{OPTIMIZE}": "gres:gpu:1", f"rule_{TRAIN}": "gres:gpu:a100:1"}
    assert asked == dict.fromkeys(asked) | gpus
    assert {shown["JobState"] for shown in jobs.values()} == {"COMPLETED"}
    return undisturbed_job(run, TRAIN, "all five jobs ran on the cluster")


def cancelled(victim: Victim) -> Row:
    """Somebody's scancel."""
    run = victim.workflow().start()
    victim.cluster.cancel(hit(run, victim.rule))
    run.wait_for_job(victim.rule, "CANCELLED")
    assert run.finish() == 0, run.text()
    assert len(run.ids()) == 2
    return stopped(run, victim.rule, "SIGTERM; one of Snakemake's retries went on")


def out_of_memory(victim: Victim) -> Row:
    """More memory than the job asked for; the next attempt asks for more."""
    run = victim.workflow(rules={victim.rule: {"mem_mb": "300 * attempt ** 2"}}).start()
    assert run.finish() == 0, run.text()
    attempts = [victim.cluster.show(job) for job in run.ids()]
    assert [shown["JobState"] for shown in attempts] == ["FAILED", "COMPLETED"]
    given = " and ".join(shown["MinMemoryNode"] for shown in attempts)
    return row(victim.rule, f"SIGKILL; one of Snakemake's retries asked for more: {given}", "all, no checkpoint yet")


def preempted(victim: Victim) -> Row:
    """A job of a partition with more priority takes the nodes, after a grace of 30 s."""
    run = victim.workflow().start()
    job = hit(run, victim.rule)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    victim.cluster.run("sbatch", *urgent)
    assert run.finish() == 0, run.text()
    assert len(run.ids()) == 1
    assert victim.cluster.show(job)["Restarts"] == "1"
    return stopped(run, victim.rule, "SIGTERM at the beginning of the grace; SLURM ran the job again")


def node_lost(victim: Victim) -> Row:
    """A power cut of the node, which comes back later."""
    run = victim.workflow().start()
    job = hit(run, victim.rule)
    since, node = age(run, victim.rule), victim.cluster.show(job)["NodeList"]
    victim.cluster.power_off(node)
    wait_for(lambda: victim.cluster.show(job)["Restarts"] == "1", 120, "SLURM to notice")
    assert run.wait_for_job(victim.rule, "RUNNING").node != node
    victim.cluster.power_on(node)
    assert run.finish() == 0, run.text()
    assert len(run.ids()) == 1
    wait_for(lambda: victim.cluster.node_state(node) == "idle", 30, "the node to come back")
    return killed(run, victim.rule, "SLURM noticed after its SlurmdTimeout and ran the job again elsewhere", since)


def node_cut_off(victim: Victim) -> Row:
    """The node is not heard of any more, but its job runs on beside the one that SLURM starts elsewhere."""
    run = victim.workflow(config=victim.folder / "config.yaml").start()
    job = hit(run, victim.rule)
    victim.cluster.cut_off(victim.cluster.show(job)["NodeList"])
    wait_for(lambda: victim.cluster.show(job)["Restarts"] == "1", 120, "SLURM to notice")
    assert run.finish() == 0, run.text()
    return row(victim.rule, "two jobs wrote the same checkpoints and the same result", "at most the job")


def controller_restarted(victim: Victim) -> Row:
    """SIGKILL to slurmctld, which is away for 20 s."""
    run = victim.workflow().start()
    hit(run, victim.rule)
    victim.cluster.kill_controller()
    time.sleep(20)
    victim.cluster.start_controller()
    assert run.finish() == 0, run.text()
    assert len(run.ids()) == 1
    return undisturbed_job(run, victim.rule, "20 s without slurmctld: the job ran on, Snakemake asked again")


def interrupted(victim: Victim) -> Row:
    """Ctrl-C: Snakemake cancels its jobs; called again, it goes on."""
    run = victim.workflow().start()
    hit(run, victim.rule)
    run.stop(signal.SIGINT)
    assert run.finish() == 1
    run.wait_for_no_job()
    assert run.start().finish() == 0, run.text()
    assert len(run.ids()) == 2
    return stopped(run, victim.rule, "it cancelled the job; called again, it went on")


def terminated(victim: Victim) -> Row:
    """SIGTERM: Snakemake waits for its jobs and submits no more."""
    run = victim.workflow().start()
    hit(run, victim.rule)
    run.stop(signal.SIGTERM)
    assert run.finish() == 1
    assert run.start().finish() == 0, run.text()
    assert len(run.ids()) == 1
    return undisturbed_job(run, victim.rule, "it waited for the job and ended; called again, it went on")


def snakemake_killed(victim: Victim) -> Row:
    """SIGKILL: the jobs run on; one cancels them, unlocks the folder and goes on."""
    run = victim.workflow().start()
    hit(run, victim.rule)
    run.stop(signal.SIGKILL)
    run.finish()
    (name,) = re.findall(r"SLURM run ID: (\S+)", run.text())
    victim.cluster.run("scancel", f"--name={name}")
    run.wait_for_no_job()
    run.call("--unlock")
    assert run.start().finish() == 0, run.text()
    assert len(run.ids()) == 2
    return stopped(run, victim.rule, "the job ran on; after scancel --name, --unlock and a new call it went on")


def disk_full(victim: Victim) -> Row:
    """No space for the job's result; it is there for the retry, which has nothing to train."""
    folder = (victim.folder / TARGETS[victim.rule]).parent
    subprocess.run(["mount", "-o", "remount,size=8k", folder], check=True)
    run = victim.workflow().start()
    wait_for(lambda: "No space left" in log_of(run, victim.rule), 300, "a full disk")
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    assert run.finish() == 0, run.text()
    assert len(run.ids()) == 2
    assert not list(folder.glob(".*"))  # nothing half-written is left
    done, total = done_in_attempts(run, victim.rule)
    assert done == [total, 0]
    return row(victim.rule, "the job failed; one of Snakemake's retries wrote the result", "none: checkpoints had it")


NAMES = {
    nothing: "(none)",
    time_limit: "time limit",
    hard_time_limit: "time limit, without a warning",
    cancelled: "scancel",
    out_of_memory: "over memory",
    preempted: "preemption",
    node_lost: "node dies, comes back",
    node_cut_off: "node is cut off, its job runs on",
    controller_restarted: "controller killed, restarted",
    interrupted: "SIGINT to Snakemake",
    terminated: "SIGTERM to Snakemake",
    snakemake_killed: "SIGKILL to Snakemake",
    disk_full: "disk full",
}
LONGER = (time_limit, hard_time_limit, node_cut_off)  # of a config of their own
QUICK = [  # what continuous integration has the time for
    (time_limit, TRAIN),
    (nothing, OPTIMIZE),
    (cancelled, OPTIMIZE),
    (preempted, TRAIN),
    (node_lost, TRAIN),
    (controller_restarted, TRAIN),
    (interrupted, OPTIMIZE),
    (snakemake_killed, TRAIN),
    (disk_full, TRAIN),
]
SLOW = [
    (hard_time_limit, TRAIN),
    (cancelled, TRAIN),
    (out_of_memory, TRAIN),
    (preempted, OPTIMIZE),
    (node_lost, OPTIMIZE),
    (node_cut_off, OPTIMIZE),
    (node_cut_off, TRAIN),
    (interrupted, TRAIN),
    (terminated, TRAIN),
]
CASES = [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}") for case in QUICK]
CASES += [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}", marks=pytest.mark.slow) for case in SLOW]
Fault = Callable[[Victim], Row]


def prepare(folder: Path, undisturbed: Workflow, fault: Fault, rule: str) -> None:
    """Puts what comes before the job into a folder, as an undisturbed run made it."""
    kept = [
        "results/data",
        ".snakemake/metadata",
        ".snakemake/compiled",
        *([f"results/faults/{CANARIES}"] if rule == TRAIN else []),
    ]
    for name in kept:
        shutil.copytree(undisturbed.folder / name, folder / name)
    if fault in LONGER:
        # A minute at the rate of an undisturbed job, which cannot end within the limit, of which its start is part.
        (rate,) = re.findall(r" 100%.*, +([\d.]+)step/s", log_of(undisturbed, rule))
        config, steps = yaml.safe_load(CONFIG.read_text(encoding="utf-8")), int(60 * float(rate))
        training, kind = config["trainings"]["sgd"], config["canaries"]["kinds"]["metagradient"]
        if rule == TRAIN:
            training["num_runs"] = training["block_size"] = 1 + steps // training["options"]["num_steps"]
        else:
            kind["num_metasteps"] = 1 + steps // kind["training"]["num_steps"]
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def summary_of(folder: Path, config: Path = CONFIG) -> bytes:
    """Makes what comes after the job, on this machine; returns the table of all audits."""
    rest = Workflow(None, folder, config=config).start()
    assert rest.finish() == 0, rest.text()
    return rest.summary()


@pytest.fixture(scope="module")
def suffered(
    request: pytest.FixtureRequest,
    make_cluster: Callable[[], Cluster],
    undisturbed: Workflow,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[tuple[Fault, str], Future[tuple[Row, bytes, bytes]]]]:
    """The row of each fault that is asked for, the table that followed, and that of an undisturbed run."""
    items = [item for item in request.session.items if item.originalname == TEST]
    asked = [(item.callspec.params["fault"], item.callspec.params["rule"]) for item in items]

    def suffer(fault: Fault, rule: str, folder: Path) -> tuple[Row, bytes, bytes]:
        prepare(folder, undisturbed, fault, rule)
        with contextlib.ExitStack() as stack:
            if fault is disk_full:
                stack.enter_context(mounted((folder / TARGETS[rule]).parent))
            with make_cluster() as cluster, explained(cluster):
                found = fault(Victim(cluster, folder, rule))
            if fault not in LONGER:
                return found, summary_of(folder), undisturbed.summary()
            config, alone = folder / "config.yaml", folder / "alone"
            prepare(alone, undisturbed, fault, rule)
            return found, summary_of(folder, config), summary_of(alone, config)

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {case: pool.submit(suffer, *case, tmp_path_factory.mktemp("fault")) for case in asked}


@pytest.mark.parametrize(("fault", "rule"), CASES)
def test_result_is_that_of_an_undisturbed_run_after(fault, rule, suffered, fault_table):
    found, summary, undisturbed = suffered[fault, rule].result()
    assert summary == undisturbed
    fault_table.append({"fault": NAMES[fault], **found, "result_identical": "yes"})


TEST = test_result_is_that_of_an_undisturbed_run_after.__name__
