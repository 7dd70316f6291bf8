"""A real SLURM cluster on this machine's loopback, and what can go wrong with it.

with Cluster(folder) as cluster:
    cluster.run("sbatch", "--wrap", "true")
    cluster.power_off("gpu1")

Node cpu1 in partition `cpu`; gpu1 and gpu2, with four pretended GPUs each, in `gpu`, in `urgent`, whose jobs take nodes
from those of `gpu` after a grace, and in `short`, which lets no job run for more than a minute. No accounting database,
no cgroups, no systemd. Nothing is installed and nothing outside the folder is written.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun", "setpriv")
SBIN = "/usr/sbin:/sbin"  # where Debian puts the daemons
NODES = ("cpu1", "gpu1", "gpu2")
MARK = "METACANARY_TEST_NODE"  # in the environment of slurmd and of its slurmstepd, not in that of jobs
ENDED = {"CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

SLURM_CONF = """\
ClusterName=metacanary
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is run again waits for cred_expire + 1 s, by default 121 s.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
{bind}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/pgid
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
# Without cgroups memory is watched: a step over its job's --mem is killed.
JobAcctGatherParams=OverMemoryKill
# Nodes claim more CPUs and memory than there are.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=20
KillWait=20
# Three times the first wait before Snakemake asks for states is what squeue needs; this is SLURM's default.
MinJobAge=300
MaxJobCount=10000
AccountingStorageType=accounting_storage/none
NodeName=cpu1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={cpu1} CPUs=32 RealMemory=1000000 State=UNKNOWN
NodeName=gpu1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={gpu1} CPUs=16 RealMemory=1000000 Gres=gpu:a100:4
NodeName=gpu2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={gpu2} CPUs=16 RealMemory=1000000 Gres=gpu:a100:4
PartitionName=cpu Nodes=cpu1 Default=YES MaxTime=1-0 State=UP
PartitionName=gpu Nodes=gpu1,gpu2 MaxTime=1-0 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=short Nodes=gpu1,gpu2 MaxTime=1 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=gpu1,gpu2 MaxTime=1-0 State=UP PriorityTier=2 PreemptMode=OFF
"""
# A GPU needs a character device, any that every machine has; no job opens it.
GRES_CONF = "NodeName=gpu1,gpu2 Name=gpu Type=a100 File=/dev/null,/dev/zero,/dev/full,/dev/random\n"

REPLACED = """\
number=$(grep -oE 'one:number=[0-9]+' <<<"$*" | head -n 1 | grep -oE '[0-9]+$')
given=()
for word; do
    [[ $word == --wrap=* ]] && word="--wrap=PAYLOAD"
    given+=("$word")
done
set -- "${given[@]}"
"""


class Job(NamedTuple):
    """A job as squeue lists it; its comment tells rule and wildcards."""

    id: str
    state: str
    node: str
    comment: str


def missing() -> list[str]:
    """Names the programs that a cluster needs and this machine has not."""
    path = f"{os.environ['PATH']}:{SBIN}"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Waits until a condition is true, and returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.1)
    return found


class Cluster:
    """A cluster in a folder of at most 70 characters, since names of Unix sockets are short."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # The plugin strips SLURM_CONF before it calls srun within a job.
        self.environment = {
            **os.environ,
            "SLURM_CONF": f"{folder}/slurm.conf",
            "PATH": f"{folder}/bin:{os.environ['PATH']}:{SBIN}",
        }

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._start("munged", "--foreground", f"--key-file={self.folder}/munge.key", *self._munge_files())
            wait_for((self.folder / "munge.sock").exists, 10, "munged")
            self.start_controller()
            for node in NODES:
                self.power_on(node)
            wait_for(lambda: all(self.node_state(node) == "idle" for node in NODES), 30, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.cancel(*[job.id for job in self.jobs() if job.state not in ENDED])
            wait_for(lambda: all(job.state in ENDED for job in self.jobs()), 30, "the jobs to end")
        for node in NODES:
            self.power_off(node)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """Runs a command as a user of the cluster does; returns what it printed."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=30, check=False
        )
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def jobs(self, comment: str = "") -> list[Job]:
        """Lists all jobs that the cluster remembers whose comment holds a text."""
        listed = self.run("squeue", "--noheader", "--states=all", "--format=%i|%T|%N|%k").splitlines()
        jobs = [Job(*line.split("|")) for line in listed]
        return [job for job in jobs if comment in job.comment]

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def describe(self) -> str:
        """Jobs, nodes and the ends of the logs, for an error message."""
        shown = [self.run("scontrol", "show", what, check=False) for what in ("jobs", "nodes")]
        logs = [f"{path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.folder.glob("*.log")]
        return "\n".join([*shown, *logs])

    def cancel(self, *jobs: str) -> None:
        """Cancels jobs."""
        if jobs:
            self.run("scancel", *jobs)

    def node_state(self, node: str) -> str:
        """The state of a node in one word: idle, mixed, allocated, down, ..."""
        shown = self.run("sinfo", "--noheader", f"--nodes={node}", "--Format=StateLong", check=False)
        return shown.split("\n")[0].strip()

    def cut_off(self, node: str) -> None:
        """SIGKILL to slurmd: the node is not heard of any more, but its jobs run on."""
        daemon = self._daemons.pop(node, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()

    def power_off(self, node: str) -> None:
        """As a power cut: slurmd and all that its jobs started are killed at once."""
        self.cut_off(node)
        steps = [pid for pid, environment in _environments() if f"{MARK}={self.folder}/{node}" in environment]
        for pid in steps:
            for each in [pid, *_descendants(pid)]:  # slurmstepd first, or it would report how its task ended
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        shutil.rmtree(self.folder / "spool" / node)
        (self.folder / "spool" / node).mkdir()

    def power_on(self, node: str) -> None:
        """Starts slurmd of a node."""
        self._start(node, "-D", "-N", node, program="slurmd", **{MARK: f"{self.folder}/{node}"})

    def count_calls(self, payload: str) -> Callable[[], dict[str, list[float]]]:
        """Notes from now on when SLURM's commands are called, and lets sbatch submit something else.

        Args:
          payload: What the job of `one:number=17` runs instead, with 17 for {number}.

        Returns:
          A function that returns the times of the calls so far, by command.
        """
        calls = self.folder / "calls"
        calls.mkdir()
        for name in ("sbatch", "squeue", "scontrol", "sacct", "sinfo", "scancel"):
            shim = self.folder / "bin" / name
            real = shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")
            replaced = "" if name != "sbatch" else REPLACED.replace("PAYLOAD", payload.replace("{number}", '"$number"'))
            shim.write_text(f'#!/bin/bash\ndate +%s.%N >>{calls}/{name}\n{replaced}exec {real} "$@"\n')
            shim.chmod(0o755)
        return lambda: {path.name: [float(line) for line in path.read_text().split()] for path in calls.iterdir()}

    def kill_controller(self) -> None:
        """SIGKILL to slurmctld."""
        daemon = self._daemons.pop("slurmctld")
        daemon.kill()
        daemon.wait()

    def start_controller(self) -> None:
        """Starts slurmctld, from its last state if there is one."""
        self._start("slurmctld", "-D")
        wait_for(lambda: "is UP" in self.run("scontrol", "ping", check=False), 30, "slurmctld")

    def _start(self, name: str, *arguments: str, program: str = "", **environment: str) -> None:
        """Starts a daemon that ends with this process, however that ends."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", program or name, *arguments],
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a Ctrl-C is not for the daemons
            )

    def _munge_files(self) -> list[str]:
        """The options that keep munged within the folder."""
        names = {"socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
        return [f"--{option}={self.folder}/{name}" for option, name in names.items()]

    def _configure(self) -> None:
        """Writes the configuration, the key, and a srun that finds them."""
        self.folder.chmod(0o755)  # munged insists: everyone may reach its socket
        for name in ("bin", "state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        user = self.run("id", "-un").strip()
        # Daemons bind to the address of the machine's name, if it is that of loopback; otherwise to all addresses.
        with contextlib.suppress(OSError):
            named = socket.gethostbyname(socket.gethostname())
        bind = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if named == "127.0.0.1" else ""
        ports = dict(zip(("port", *NODES), _free_ports(1 + len(NODES)), strict=True))
        text = SLURM_CONF.format(folder=self.folder, user=user, bind=bind, **ports)
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        (self.folder / "gres.conf").write_text(GRES_CONF, encoding="utf-8")
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        srun = self.folder / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)


def _free_ports(count: int) -> list[int]:
    """Ports on which nobody listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _environments() -> Iterator[tuple[int, list[str]]]:
    """The environments of all processes that may be read."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_text(errors="replace").split("\0")


def _descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    return found
