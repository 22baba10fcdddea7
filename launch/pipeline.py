"""A pipeline: `darkroom` commands with the resources of each, in a chain of SLURM jobs. docs/launch.md."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import NAME, check_path, check_words

_TIME = re.compile(r"\d{1,4}(:\d{2}){0,2}|\d{1,3}-\d{1,2}(:\d{2}){0,2}")
OF_SEVERAL_RANKS = ("train", "encode")  # commands whose processes share the work


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command and what it needs."""

    run: str  # what follows `darkroom`, in a shell's words; nothing in it is expanded
    nodes: int = 1  # nodes, at most
    min_nodes: int | None = None  # nodes it may also start with, when no more can be had; None = nodes
    ranks_per_node: int | None = None  # None = the site's GPUs per node, or 1; other commands than train and encode: 1
    time: str = "24:00:00"  # limit of one attempt, as sbatch takes it
    array: int = 1  # jobs that share the work without talking (encode)
    after: tuple[str, ...] | None = None  # stages that must be done; None = the one before

    def __post_init__(self) -> None:
        check_words("run", self.run)
        if not self.words:
            raise ValueError("run is empty; give a darkroom command like `train dit digits-dit`")
        if not _TIME.fullmatch(self.time):
            raise ValueError(f"time {self.time!r} is not MINUTES, HH:MM:SS or D-HH:MM:SS; correct it")
        if self.nodes < 1 or self.array < 1 or (self.ranks_per_node is not None and self.ranks_per_node < 1):
            raise ValueError("nodes, array and ranks_per_node must be at least 1; correct them")
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} must be from 1 to nodes {self.nodes}; correct it")
        if self.array > 1 and self.words[0] != "encode":
            raise ValueError(f"array {self.array}: only encode can be split into jobs; remove it")
        if self.nodes > 1 and not self.is_of_several_ranks:
            raise ValueError(f"nodes {self.nodes}: `{self.words[0]}` runs in one process; remove it")
        if "--nproc" in self.words:
            raise ValueError("run holds --nproc; give ranks_per_node instead")

    @property
    def words(self) -> list[str]:
        """The command's arguments."""
        try:
            return shlex.split(self.run)
        except ValueError as error:
            raise ValueError(f"run {self.run!r}: {str(error).lower()}; correct its quotes") from None

    @property
    def is_of_several_ranks(self) -> bool:
        return self.words[0] in OF_SEVERAL_RANKS

    def ranks_on_node(self, gpus_per_node: int) -> int:
        """Processes of this stage on each node."""
        return self.ranks_per_node or (max(gpus_per_node, 1) if self.is_of_several_ranks else 1)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages by name, in order."""

    name: str  # of the jobs, with the stage's
    folder: str  # shared by all nodes; scripts, logs and records go in
    stages: Mapping[str, Stage]

    def __post_init__(self) -> None:
        for name in (self.name, *self.stages):
            if not NAME.fullmatch(name):
                raise ValueError(f"name {name!r} may hold letters, digits and _ . - only, 64 at most; choose another")
        check_path("folder", self.folder)
        if not self.stages:
            raise ValueError("stages is empty; give at least one")
        seen: list[str] = []
        for name, stage in self.stages.items():
            for earlier in stage.after or ():
                if earlier not in seen:
                    raise ValueError(
                        f"stages.{name}.after {earlier!r} is no stage above it; there are {', '.join(seen)}"
                    )
            seen.append(name)

    def after(self, name: str) -> tuple[str, ...]:
        """The stages that must be done before this one."""
        names = list(self.stages)
        given = self.stages[name].after
        return given if given is not None else tuple(names[max(names.index(name) - 1, 0) : names.index(name)])

    @property
    def root(self) -> Path:
        """The pipeline's folder, absolute: jobs see it from another working folder."""
        return Path(self.folder).absolute()
