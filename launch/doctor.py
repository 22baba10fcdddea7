"""What `darkroom doctor` says of this machine: versions, accelerators, and everything that a new user trips over.

Each finding has its remedy. It reads no weights and opens no connection; what needs the other packages (a recipe's
data and weights, a store) is added by the command line.
"""

import importlib.util
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from launch.runtime import core_count, gpu_count

PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "accelerate",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "boto3",
    "safetensors",
    "diffusers",
)
OPTIONAL = {"diffusers": "export; install darkroom[serve]"}
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OLD_LOCK_S = 3600


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that will go wrong, or may."""

    state: Literal["problem", "warning"]
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.state}: {self.what}; {self.remedy}"


def examine() -> dict[str, Any]:
    """Facts about this machine and installation; `missing` lists what a run would fail without."""
    missing: list[str] = []
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            packages.append(f"{name} absent" + (f" ({OPTIONAL[name]})" if name in OPTIONAL else ""))
            if name not in OPTIONAL:
                missing.append(name)
    return {
        "darkroom": _own_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": core_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators(),
        "slurm": shutil.which("sbatch") or "no sbatch here",
        "packages": packages,
        "missing": missing,
    }


def findings() -> list[Finding]:
    """What is wrong with this machine and shell, worst first."""
    found = [finding for look in _LOOKS for finding in look()]
    return sorted(found, key=lambda finding: finding.state)  # "problem" stands before "warning"


def as_rows(found: list[Finding]) -> list[dict[str, str]]:
    return [asdict(finding) for finding in found]


def _own_version() -> str:
    try:
        return metadata.version("darkroom")
    except metadata.PackageNotFoundError:
        return "not installed (run from its source)"


def _accelerators() -> list[str]:
    if gpu_count() == 0:
        return []
    try:
        import torch  # seconds to import: only where there is a device to ask about
    except ImportError:
        return [f"{gpu_count()} device(s), but torch is absent"]
    if not torch.cuda.is_available():
        return [f"{gpu_count()} device(s), but torch {torch.__version__} cannot use them"]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in found]


# --- what people trip over ----------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    """Packages outside of what Darkroom, or torchvision of its torch, says it can do with."""
    if importlib.util.find_spec("packaging") is None:
        return
    from packaging.requirements import Requirement

    for owner, only in (("darkroom", None), ("torchvision", "torch")):
        try:
            wanted = metadata.requires(owner) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, wanted):
            if requirement.marker is not None or only not in (None, requirement.name):
                continue
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                yield problem(f"{requirement.name} is absent, which {owner} needs", "run `make install`")
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                what = f"{requirement.name} {version} is installed, {owner} needs {requirement.specifier}"
                yield problem(what, "run `make install`")


def _devices() -> Iterator[Finding]:
    """GPUs that are there and not used."""
    from launch.node_check import device_problems

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden not in (None, "", "-1") and gpu_count() == 0:
        yield problem(f"CUDA_VISIBLE_DEVICES is {hidden!r} and no such GPU is there", "unset it")
    for what in device_problems():
        remedy = "compare `nvidia-smi` and torch's CUDA version: the driver is too old, or torch is built for CPU"
        yield problem(what, remedy)


def _shell() -> Iterator[Finding]:
    """Variables that make every command believe it was a rank of something."""
    if found := [name for name in _RANK_VARIABLES if name in os.environ]:
        yield warning(f"{', '.join(found)} set in this shell: training takes itself for one rank", "unset them")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) > core_count():
        yield warning(f"OMP_NUM_THREADS is {threads} with {core_count()} cores", "unset it")


def _room() -> Iterator[Finding]:
    """Disks and limits."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    for what, folder, least_gib in (
        ("the working folder", Path.cwd(), 5.0),
        ("temporary files", Path(tempfile.gettempdir()), 2.0),
        ("copies of s3:// artifacts (XDG_CACHE_HOME)", there, 2.0),
    ):
        free_gib = shutil.disk_usage(folder).free / 2**30
        if free_gib < least_gib:
            yield warning(f"{folder} ({what}) has {free_gib:.1f} GiB free", "make room, or choose another disk")
        if not os.access(folder, os.W_OK):
            yield problem(f"{folder} ({what}) cannot be written to", "correct its rights, or choose another folder")
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < 2**30:
        yield warning(
            "/dev/shm has less than 1 GiB free: reader processes die of it",
            "give the container more (--shm-size=8g), or set data.num_workers=0",
        )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < 1024:
        yield warning(f"only {files} open files are allowed", "raise it: ulimit -n 65536")


def _old_locks() -> Iterator[Finding]:
    """torch waits for ever for the lock of a build that was killed."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in root.glob("**/lock") if root.is_dir() else ():
        if time.time() - lock.stat().st_mtime > _OLD_LOCK_S:
            yield warning(f"{lock} was left by a build that was killed, and builds wait for it", "remove that file")


def problem(what: str, remedy: str) -> Finding:
    """A finding that ends a run."""
    return Finding(state="problem", what=what, remedy=remedy)


def warning(what: str, remedy: str) -> Finding:
    """A finding that may."""
    return Finding(state="warning", what=what, remedy=remedy)


_LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (*(_versions, _devices, _shell, _room, _old_locks),)
