"""A real SLURM cluster on this machine: munged, slurmctld and several slurmd in a folder of their own.

Debian's packages slurmctld, slurmd, slurm-client and munge; as root; no systemd, no cgroups, no accounting. The
"nodes" share the machine, so they differ by port alone. Everything is ended by the process ids it was started with.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = "slurmctld slurmd slurm-client munge"
REQUEUE_S = 8  # SLURM holds a requeued job back until its old credentials have expired, and a second more
CONF = """\
ClusterName=darkroom
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
CredType=cred/munge
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=10
KillWait=20
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_absent() -> str:
    """Why no cluster can be started here, or nothing."""
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if absent:
        return f"{', '.join(absent)} absent; apt-get install {PACKAGES}"
    return "" if os.geteuid() == 0 else "a SLURM cluster for tests is started as root"


def until(what: str, check: Callable[[], object], limit_s: float = 60.0) -> object:
    """The first true answer of `check`; an assertion that names `what` after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.1)
    raise AssertionError(f"after {limit_s:.0f} s still not: {what}")


def alive(pid: int) -> bool:
    """Is the process there, and not merely waiting to be reaped?"""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class SlurmCluster:
    """`with SlurmCluster(2) as cluster:`; nodes n1, n2 … in one partition `train`, two cores each."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.folder = Path(tempfile.mkdtemp(prefix="darkroom-slurm-"))
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.env["PATH"] = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]

    def __enter__(self) -> "SlurmCluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all jobs, then all daemons, then whatever a job left."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--partition=train", check=False)
            until("no jobs", lambda: not self.run("squeue", "-h", check=False).strip(), 30)
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid") if path.read_text().strip()]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in [pid for pid in pids if alive(pid)] + self.job_processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                until("all ended", lambda: not any(map(alive, pids)) and not self.job_processes(), 10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)  # munged wants its socket to be reachable
        (folder / "state").mkdir()
        controller_port, *node_ports = _free_ports(1 + self.nodes)
        conf = CONF.format(
            **{"host": socket.gethostname(), "folder": folder, "nodes": self.nodes, "expire": REQUEUE_S},
            **{"controller_port": controller_port, "node_ports": "[" + ",".join(map(str, node_ports)) + "]"},
        )
        (folder / "slurm.conf").write_text(conf)
        (folder / "cgroup.conf").write_text("")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        files = {"key": "munge.key", "socket": "munge.socket", "pid": "munge.pid", "log": "munge.log", "seed": "seed"}
        self.run(
            "munged",
            "--force",
            *(f"--{name}-file={folder / file}" for name, file in files.items() if name != "socket"),
            f"--socket={folder / 'munge.socket'}",
        )
        self.run("slurmctld")
        for number in range(1, self.nodes + 1):
            self.start_node(f"n{number}")
        until("all nodes idle", lambda: self.states() == ["idle"] * self.nodes)

    def start_node(self, name: str) -> None:
        self.run("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """The node's daemon dies; what it had started lives on."""
        os.kill(int((self.folder / f"slurmd.{name}.pid").read_text()), signal.SIGKILL)

    def states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split()

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert not (check and done.returncode), f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job_id: int) -> dict[str, str]:
        """What the controller knows of a job, by name; empty once it has forgotten it."""
        text = self.run("scontrol", "-o", "show", "job", str(job_id), check=False)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def limit(self, job_id: int, time: str) -> None:
        """Gives a job another time limit (HH:MM:SS); one that is just ending takes it when it is queued again."""

        def done() -> bool:
            self.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={time}", check=False)
            return self.job(job_id).get("TimeLimit") == time

        until(f"job {job_id} has the limit {time}", done)

    def job_processes(self) -> list[int]:
        """Processes that jobs of this cluster started and that still run, wherever their parents went."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if mark in words and any(word.startswith(b"SLURM_JOB_ID=") for word in words):
                    found.append(int(path.parent.name))
        return [pid for pid in found if alive(pid)]
