"""SIGKILL at random points of a run, for many seeds: the same command resumes until it is done, and nobody can tell.

A seed gives the kind of point (in the middle of a step, of a write, of an upload, between upload and manifest, during
clean-up …), the ZeRO stage, the rank that dies and at which of its passes of that point; how many passes there are was
counted in an undisturbed run. Every other seed is killed again while it resumes.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.command import Result, write_recipe
from tests.helpers.fault_points import counted
from tests.helpers.ledger_runs import recorded
from tests.helpers.runs import curve
from tests.helpers.warm_ranks import darkroom

POINTS = (
    *("step-after", "flush-before", "put-after", "manifest-before", "delete-before", "manifest-after"),
    *(
        "rename-after",
        "rename-before",
        "batch-before",
        "step-before",
        "put-before",
        "delete-after",
        "put_if_absent-after",
    ),
)
UPLOAD = ("put-before", "flush-before", "put-after")  # of a rank's files: it is not the one that commits
SEEDS = 39  # each point at each stage: 13 points, and 13 mod 3 is 1
QUICK = 6
STEPS = 8


@dataclass(frozen=True)
class Whole:
    """An undisturbed run on two ranks."""

    run: Path
    passes: dict[tuple[str, int], int]


@dataclass(frozen=True)
class Plan:
    """What a seed does."""

    kind: str
    stage: int
    deaths: tuple[str, ...]
    ranks: int  # that resume

    @classmethod
    def of(cls, seed: int, passes: dict[tuple[str, int], int]) -> "Plan":
        draw = random.Random(seed)
        deaths = []
        for point in (POINTS[seed % len(POINTS)], *draw.sample(POINTS, seed % 2)):
            ranks = [rank for (name, rank), count in sorted(passes.items()) if name == point]
            rank = max(ranks) if point in UPLOAD else draw.choice(ranks)
            # How often old checkpoints are deleted depends on when the one before is done: half as often is certain.
            count = passes[point, rank] // (2 if point.startswith("delete") else 1)
            deaths.append(f"{point}:{draw.randint(1, count)}:{rank}")
        return cls(kind=kind_of(seed), stage=stage_of(seed), deaths=tuple(deaths), ranks=(1, 4)[seed // 5 % 2])


def kind_of(seed: int) -> str:
    return {2: "dit-bfloat16", 3: "autoencoder"}.get(seed % 5, "dit")


def stage_of(seed: int) -> int:
    return 1 + seed % 3


@pytest.fixture(scope="module")
def recipes(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    changes = {"total_steps": STEPS, "text_encoders": tiny.ENCODERS[:1]}
    dit = tiny.dit_recipe(world.data, world.autoencoder, **changes)
    autoencoder = tiny.autoencoder_recipe(world.data, total_steps=STEPS)
    often = replace(dit.checkpoint, every_steps=2, keep_last=2)
    low = replace(dit, engine=replace(dit.engine, precision="bfloat16"))  # with fp32 masters, as on GPUs
    return {
        kind: write_recipe(folder / f"{kind}.yaml", kind.partition("-")[0], replace(recipe, checkpoint=often))
        for kind, recipe in (("dit", dit), ("dit-bfloat16", low), ("autoencoder", autoencoder))
    }


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory):
    """Undisturbed runs by kind and stage, made when they are first asked for."""
    done: dict[tuple[str, int], Whole] = {}

    def get(kind: str, stage: int) -> Whole:
        if (kind, stage) not in done:
            folder = tmp_path_factory.mktemp(f"{kind}-{stage}")
            (folder / "passes").mkdir()
            result = train(recipes[kind], folder / "run", stage, 2, die=f"count:{folder / 'passes'}")
            assert result.code == 0, result.err
            done[kind, stage] = Whole(folder / "run", counted(folder / "passes"))
        return done[kind, stage]

    return get


def train(recipe: Path, run: Path, stage: int, ranks: int, die: str = "") -> Result:
    command = ("train", recipe.stem.partition("-")[0], recipe, "--run", run, "--nproc", ranks)
    return darkroom(*command, f"engine.zero_stage={stage}", die=die)


def last_commit(run: Path) -> tuple[dict[str, str], dict]:
    """SHA-256 of every file (weights, averages, moments) by its name without the attempt's; and the state."""
    manifest = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    state = manifest["meta"]["state"]
    del state["counters"]["elapsed_s"]
    return {key.partition("/")[2]: entry["sha256"] for key, entry in manifest["files"].items()}, state


def artifact(run: Path) -> dict[str, bytes]:
    folder = run / "artifact"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def visits(run: Path) -> dict[int, list[int]]:
    """What every micro-batch of the run consisted of, by the ledger, which must be clean."""
    result = darkroom("data", "ledger", run, "--json")
    assert result.code == 0, result.err
    return recorded(run / "ledger", json.loads(result.out)["attempts"], micro_batch_size=2)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.all] * (seed >= QUICK)) for seed in range(SEEDS)]
)
def test_a_killed_run_ends_as_the_undisturbed_one(recipes, whole, tmp_path, seed):
    kind, stage = kind_of(seed), stage_of(seed)
    undisturbed = whole(kind, stage)
    plan = Plan.of(seed, undisturbed.passes)
    run, recipe = tmp_path / "run", recipes[kind]
    killed = train(recipe, run, stage, 2, die=plan.deaths[0])
    assert killed.code == 137, (plan, killed.err)
    for death in plan.deaths[1:]:
        again = train(recipe, run, stage, 2, die=death)
        assert again.code in (0, 137), (plan, again.err)  # 0: what was left to do did not come to that point
    elsewhere = seed % 5 == 4
    done = train(recipe, run, stage, plan.ranks if elsewhere else 2)
    assert done.code == 0, (plan, done.err)

    rows, expected = curve(run), curve(undisturbed.run)
    assert visits(run) == visits(undisturbed.run)
    if elsewhere:  # the order of float32 sums
        for mine, theirs in zip(rows, expected, strict=True):
            assert mine["images_seen"] == theirs["images_seen"]
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        return
    assert rows == expected, plan
    assert last_commit(run) == last_commit(undisturbed.run), plan
    assert artifact(run) == artifact(undisturbed.run), plan


def test_a_start_that_is_killed_is_begun_again(recipes, whole, tmp_path):
    """Before run.yaml has its name, and between the two frozen networks that a run keeps."""
    run = tmp_path / "run"
    for death in ("rename-before:1:0", "rename-after:2:0"):
        assert train(recipes["dit"], run, 2, 2, die=death).code == 137
    assert (run / "frozen" / "autoencoder").exists() and not (run / "frozen" / "text_encoders").exists()
    done = train(recipes["dit"], run, 2, 2)
    assert done.code == 0, done.err
    assert curve(run) == curve(whole("dit", 2).run)


def test_the_seeds_cover_every_point_on_both_ranks_at_every_stage(whole):
    plans = [Plan.of(seed, whole("dit", 2).passes) for seed in range(SEEDS)]
    first = [plan.deaths[0].split(":") for plan in plans]
    assert {point for point, _, _ in first} == set(POINTS)
    assert {rank for _, _, rank in first} == {"0", "1"}
    assert all(rank == "1" for point, _, rank in first if point in UPLOAD)
    at = {(point, plan.stage) for (point, _, _), plan in zip(first, plans, strict=True)}
    assert at == {(point, stage) for point in POINTS for stage in (1, 2, 3)}
    assert {plan.stage for plan in plans[:QUICK]} == {1, 2, 3}
