"""The facts of a site, `cluster.yaml`: everything a job script needs that is no property of the model. docs/launch.md.

Every value that reaches a job script is checked here to be what it claims, and quoted where it is used besides.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launch.errors import ConfigError

CLUSTER_VARIABLE = "DARKROOM_CLUSTER"  # names the file, where --cluster does not
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:/=+@*&|()\[\]-]+)?")
_VALUE = re.compile(r"[A-Za-z0-9_.,:/=+@*&|()\[\]-]+")
_MODULE = re.compile(r"[A-Za-z0-9_.+/-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(r"(?i)secret|passw|token|api_?key|access_?key|credential")
_SECRET_VALUE = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|X-Amz-(?:Signature|Credential)=|://[^/\s@]+:[^/\s@]+@")


def check_words(place: str, *words: str) -> None:
    """Refuses text that no file or argument should hold: control characters, and what looks like a credential."""
    for word in words:
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in word):
            raise ValueError(f"{place} {word!r} holds a line break or another control character; remove it")
        if _SECRET_VALUE.search(word):
            raise ValueError(
                f"{place} holds what looks like a credential; job scripts are readable by others: name the variable "
                "in pass_environment, or use a file that AWS_SHARED_CREDENTIALS_FILE names"
            )


def check_path(place: str, path: str) -> None:
    """Refuses a path that would need quotes in a line of #SBATCH."""
    if not re.fullmatch(r"[A-Za-z0-9_.,:/=+@-]+", path):
        raise ValueError(f"{place} {path!r} may hold letters, digits and _ . , : / = + @ - only; choose another folder")


def _check_all(place: str, pattern: re.Pattern[str], values: tuple[str, ...]) -> None:
    for value in values:
        if not pattern.fullmatch(value):
            raise ValueError(f"{place} {value!r} is not of the form {pattern.pattern}; correct it")


@dataclass(frozen=True, kw_only=True)
class Container:
    """What the ranks run in. The batch script itself stays outside: it needs SLURM's commands."""

    kind: Literal["pyxis", "apptainer"]  # enroot by its SLURM plugin, or apptainer
    image: str  # what srun --container-image or apptainer exec takes
    mounts: tuple[str, ...] = ()  # HOST:CONTAINER each; the pipeline's folder must be visible under its own path
    darkroom: str = "darkroom"  # the command in the image

    def __post_init__(self) -> None:
        check_words("container", self.image, self.darkroom, *self.mounts)
        for mount in self.mounts:
            if mount.count(":") not in (1, 2) or "," in mount:
                raise ValueError(f"container.mounts {mount!r} is not HOST:CONTAINER; correct it")


@dataclass(frozen=True, kw_only=True)
class RequeuePolicy:
    """When a stage is tried again, and when no more."""

    give_up_after: int = 4  # attempts in a row without a new checkpoint
    backoff_s: int = 30  # s before the next attempt after a failure; doubles with each in a row
    max_backoff_s: int = 900  # s, at most
    exclude_node_after: int = 2  # failures of one node, over all attempts; 0 = never

    def __post_init__(self) -> None:
        if self.give_up_after < 1 or self.backoff_s < 0 or self.max_backoff_s < 0 or self.exclude_node_after < 0:
            raise ValueError("give_up_after must be at least 1 and the other numbers at least 0; correct them")


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What every node must show before ranks start on it."""

    enabled: bool = True  # before each attempt of a stage of several ranks
    exclude: bool = True  # a node that fails is excluded and the job queued again; else the stage ends
    min_free_gib: float = 10.0  # GiB on the scratch folder and in the working folder
    max_clock_skew_s: float = 2.0  # s from the median of all nodes
    min_all_reduce_gb_s: float = 0.0  # GB/s of gradient each rank gets reduced, over all ranks; 0 = whatever it is
    max_slowdown: float = 1.5  # a node may take so many times the median for the same work or the same transfer
    timeout_s: int = 300  # s for the whole check; a node that has not answered by then is bad
    store: str = ""  # a folder or s3:// prefix in which to put, get and delete a file; empty = none

    def __post_init__(self) -> None:
        check_words("preflight.store", self.store)
        if self.max_slowdown <= 1 or self.timeout_s < 1 or self.max_clock_skew_s <= 0:
            raise ValueError(
                "max_slowdown must be above 1, timeout_s at least 1, max_clock_skew_s above 0; correct them"
            )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One site."""

    partition: str | None = None  # None = SLURM's default
    account: str | None = None  # None = the user's default
    gpus_per_node: int = 0  # 0 = the ranks compute on CPU cores
    cpus_per_rank: int | None = None  # cores; None = SLURM's default
    tasks: Literal["rank", "node"] = "rank"  # what srun starts: every rank, or one torchrun per node
    sbatch_options: tuple[str, ...] = ()  # further lines for every job, like --qos=long
    modules: tuple[str, ...] = ()  # `module load`, in this order
    darkroom: str | None = None  # the command, at a place that all nodes see; None = the one that submits
    container: Container | None = None
    environment: Mapping[str, str] = field(default_factory=dict)  # of every job; no credentials
    pass_environment: tuple[str, ...] = ()  # names of variables to take along from the shell that submits
    network_interface: str | None = None  # for NCCL and gloo, like ib0
    scratch: str | None = None  # node-local folder for temporary files
    save_s: int = 300  # s before a time limit at which the ranks are told to save and end
    requeue: RequeuePolicy = field(default_factory=RequeuePolicy)
    preflight: Preflight = field(default_factory=Preflight)

    def __post_init__(self) -> None:
        for name in ("partition", "account", "network_interface"):
            if getattr(self, name) is not None:
                _check_all(name, _VALUE, (getattr(self, name),))
        _check_all("sbatch_options", _OPTION, self.sbatch_options)
        _check_all("modules", _MODULE, self.modules)
        _check_all("environment", _VARIABLE, tuple(self.environment))
        _check_all("pass_environment", _VARIABLE, self.pass_environment)
        check_words("environment", *self.environment.values())
        check_words("cluster", *(text for text in (self.darkroom, self.scratch) if text is not None))
        for name in self.environment:
            if _SECRET_NAME.search(name) and not name.endswith("_FILE"):
                raise ValueError(
                    f"environment {name} looks like a credential, and job scripts are readable by others; "
                    "name it in pass_environment instead"
                )
        if self.gpus_per_node < 0 or (self.cpus_per_rank is not None and self.cpus_per_rank < 1) or self.save_s < 1:
            raise ValueError("gpus_per_node must be at least 0, cpus_per_rank and save_s at least 1; correct them")


def load_cluster(path: str | Path | None = None) -> Cluster:
    """The site's file: `path`, else $DARKROOM_CLUSTER, else cluster.yaml here or in ~/.config/darkroom.

    Raises:
        ConfigError: there is none, or it holds an unknown key or an impossible value.
    """
    from launch.config_io import from_dict, read_yaml

    named = path or os.environ.get(CLUSTER_VARIABLE)
    candidates = [Path(named)] if named else [Path("cluster.yaml"), Path.home() / ".config/darkroom/cluster.yaml"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        tried = " nor ".join(map(str, candidates))
        raise ConfigError(
            f"the site's facts are in neither {tried}; write one (docs/launch.md) or give --cluster FILE"
            if not named
            else f"{named} does not exist; give another --cluster FILE"
        )
    return from_dict(Cluster, read_yaml(found), str(found))
