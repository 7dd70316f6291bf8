"""How long the paper's whole matrix takes to plan, and what many jobs ask of the scheduler."""

import re
import resource
import subprocess
import sys
import time

import pytest
import yaml
from workflows import ROOT, environment, write_profile

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_JOBS = 500
# In the place of each job's own two Snakemakes, which take seconds of CPU time: this machine has to run them all.
PAYLOAD = "mkdir -p done; sleep 1; touch done/{number}"


def test_matrix_of_the_paper_is_planned_in_half_a_minute(tmp_path):
    """5 settings, 5 epsilons, 5 kinds of canaries and 9 models, each a job of its own: 1125 trainings."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    kinds, private = config["canaries"]["kinds"], config["trainings"]["dpsgd"]
    names = [*kinds, *(f"{name}_again" for name in kinds)][:5]
    kinds |= {name: kinds[name.removesuffix("_again")] for name in names}
    config["trainings"] = {f"dpsgd{n}": {**private, "canaries": names} for n in range(5)}
    config["figures"] |= {"figure2_training": "dpsgd0", "figure2_epsilon": 8}
    file = tmp_path / "matrix.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    call = [sys.executable, "-m", "snakemake", "--dry-run", "--quiet", "rules", "--directory", str(tmp_path)]
    call += ["--snakefile", str(ROOT / "Snakefile"), "--configfile", str(file)]
    began, used = time.perf_counter(), cpu_seconds()
    planned = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    wall, used = time.perf_counter() - began, cpu_seconds() - used
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert re.search(r"train_audit_models +1125\n", planned.stdout)
    print(f"planned in {wall:.1f} s, of which {used:.1f} s of CPU time")
    assert used < 30  # one process: its wall time on a machine that does nothing else


def cpu_seconds():
    """What finished child processes have used so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_many_jobs_make_no_storm_on_the_scheduler(make_cluster, tmp_path, load_table):
    """Under the shipped profile with its own waits: calls of sbatch and of all that asks for states, a minute."""
    profile = write_profile(tmp_path / "profile", shortened=False)
    with make_cluster() as cluster:
        calls = cluster.count_calls(PAYLOAD)
        call = [sys.executable, "-m", "snakemake", "--profile", str(profile), "--directory", str(tmp_path)]
        call += ["--snakefile", str(ROOT / "tests/slurm/many.smk")]
        began = time.time()
        done = subprocess.run(call, env=environment(cluster), capture_output=True, text=True, check=False, timeout=800)
        seconds = time.time() - began
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list((tmp_path / "done").iterdir())) == NUM_JOBS
        times = calls()
    assert len(times["sbatch"]) == NUM_JOBS  # none twice
    per_minute = {name: busiest_minute(each) for name, each in times.items()}
    load_table += [
        {"command": name, "calls": len(each), "calls_in_the_busiest_minute": per_minute[name]}
        for name, each in sorted(times.items())
    ]
    print(f"{NUM_JOBS} jobs in {seconds:.0f} s: {per_minute}")
    assert per_minute["sbatch"] <= 120
    assert per_minute["squeue"] <= 13  # one in 5 s


def busiest_minute(times):
    """The most calls within a minute."""
    return max(sum(start <= each < start + 60 for each in times) for start in times)
