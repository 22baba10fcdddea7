"""Job scripts: readable, valid, and no value of a recipe or a site becomes shell code."""

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.cluster import Cluster, Container, load_cluster
from launch.config_io import from_dict, load_recipe
from launch.errors import ConfigError
from launch.pipeline import Pipeline, Stage
from launch.slurm import Place, render, seconds

PLACE = Place(working_folder=Path("/lab/my runs"), darkroom="/opt/venv/bin/darkroom")
GOLDEN = """\
#!/bin/bash -l
# Stage dit of pipeline faces, written by `darkroom launch slurm`.
#SBATCH --job-name=faces.dit
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --open-mode=append
#SBATCH --output=/runs/faces/dit/log.txt
#SBATCH --export=HOME,USER,LOGNAME,PATH,LANG,AWS_PROFILE
#SBATCH --exclusive

set -eo pipefail
cd '/lab/my runs'
module load cuda/12.8
export PYTHONUNBUFFERED=1
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export TMPDIR=/scratch
export NCCL_DEBUG=WARN

exec /opt/venv/bin/darkroom launch supervise /runs/faces/dit -- \\
  srun --kill-on-bad-exit=1 --wait=0 --export=ALL --ntasks-per-node=8 --cpus-per-task=12 \\
  /opt/venv/bin/darkroom launch task -- \\
    train dit dit-2b-256 --run runs/faces data.shards=s3://lab/faces
"""
SITE = Cluster(
    partition="gpu",
    account="lab",
    gpus_per_node=8,
    cpus_per_rank=12,
    sbatch_options=("--exclusive",),
    modules=("cuda/12.8",),
    environment={"NCCL_DEBUG": "WARN"},
    pass_environment=("AWS_PROFILE",),
    network_interface="ib0",
    scratch="/scratch",
)


def pipeline(run: str, name: str = "dit", **more: Any) -> Pipeline:
    return Pipeline(name="faces", folder="/runs/faces", stages={name: Stage(run=run, **more)})


def test_a_script_reads_like_this() -> None:
    plan = pipeline("train dit dit-2b-256 --run runs/faces data.shards=s3://lab/faces", nodes=4)
    assert render(plan, "dit", SITE, PLACE) == GOLDEN


def test_a_stage_that_takes_what_it_gets() -> None:
    script = render(pipeline("train dit x", nodes=4, min_nodes=2), "dit", SITE, PLACE)
    assert "#SBATCH --nodes=2-4\n#SBATCH --mincpus=96\n#SBATCH --gpus-per-node=8\n" in script
    assert "#SBATCH --ntasks" not in script and "--ntasks-per-node=8 --cpus-per-task=12" in script


def test_arrays_containers_and_torchrun() -> None:
    site = dataclasses.replace(SITE, container=Container(kind="pyxis", image="lab#darkroom:1", mounts=("/runs:/runs",)))
    script = render(pipeline("encode e.yaml", "encode", array=16), "encode", site, PLACE)
    assert "#SBATCH --array=0-15\n" in script and "#SBATCH --output=/runs/faces/encode/log-%a.txt\n" in script
    assert "'--container-image=lab#darkroom:1' --container-mounts=/runs:/runs '--container-workdir=/lab/my runs'" in (
        script.replace(" \\\n ", "")
    )
    assert script.replace(" \\\n ", "").endswith("darkroom launch task --   encode e.yaml\n")

    site = dataclasses.replace(
        SITE, tasks="node", container=Container(kind="apptainer", image="d.sif", mounts=("/a:/b",))
    )
    script = render(pipeline("train dit x", nodes=2), "dit", site, PLACE)
    assert "#SBATCH --ntasks-per-node=1\n" in script and "#SBATCH --cpus-per-task=96\n" in script
    flat = script.replace(" \\\n ", "")
    assert "apptainer exec --nv --bind /a:/b --pwd '/lab/my runs' d.sif darkroom launch task --torchrun 8 --" in flat

    export = render(pipeline("export runs/faces --out x", "export"), "export", site, PLACE)  # one process, one GPU
    assert "#SBATCH --gpus-per-node=1\n" in export and "--torchrun" not in export


HOSTILE = (
    "$(touch CANARY)",
    "`touch CANARY`",
    "; touch CANARY;",
    "' ; touch CANARY '",
    '"$(touch CANARY)"',
    "&& touch CANARY",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_values_stay_values(text: str, tmp_path: Path) -> None:
    """The script is run: what it executes in the end gets every word as it was written."""
    canary = tmp_path / "no"
    text = text.replace("CANARY", str(canary))
    show = tmp_path / "darkroom"
    show.write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$VALUE" "$PWD"\n')
    show.chmod(0o755)
    folder = tmp_path / f"here {text.replace('/', '_')}"
    folder.mkdir()
    plan = Pipeline(
        name="p", folder=str(tmp_path), stages={"dit": Stage(run=f"train dit x {shlex.quote(f'a.b={text}')}")}
    )
    site = Cluster(environment={"VALUE": text}, container=Container(kind="apptainer", image=text), darkroom=str(show))
    script = tmp_path / "job.sh"
    script.write_text(render(plan, "dit", site, Place(working_folder=folder, darkroom="")))
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-2:] == [text, str(folder)] and said[-3] == f"a.b={text}" and text in said[:-3]
    assert not canary.exists()
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert not any(text in line for line in directives)


@pytest.mark.parametrize("text", [*HOSTILE, "a\n#SBATCH --uid=0", "x y", "$HOME", "é", ""])
def test_names_and_folders_are_names(text: str) -> None:
    values: dict[str, Any] = {"name": "p", "folder": "runs/p", "stages": {"a": {"run": "report runs"}}}
    for changed in ({"name": text}, {"folder": text}, {"stages": {text: {"run": "report runs"}}}):
        with pytest.raises(ConfigError):
            from_dict(Pipeline, values | changed)
    for key in ("partition", "account", "network_interface"):
        with pytest.raises(ConfigError):
            from_dict(Cluster, {key: text})
    for site in (
        {"sbatch_options": [text]},
        {"modules": [text]},
        {"environment": {text: "1"}},
        {"pass_environment": [text]},
    ):
        with pytest.raises(ConfigError):
            from_dict(Cluster, site)
    for stage in ({"time": text}, {"after": [text]}):
        with pytest.raises(ConfigError):
            from_dict(Pipeline, values | {"stages": {"a": {"run": "report runs", **stage}}})


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a credential"),
        ({"environment": {"WANDB_API_KEY": "x"}}, "name it in pass_environment"),
        ({"environment": {"URL": "https://me:pw@host/x"}}, "looks like a credential"),
        ({"environment": {"A": "one\ntwo"}}, "line break"),
        ({"container": {"kind": "pyxis", "image": "a\nb"}}, "line break"),
        ({"container": {"kind": "docker", "image": "a"}}, "expected one of"),
        ({"partitions": "x"}, "did you mean 'partition'?"),
        ({"requeue": {"give_up_afer": 2}}, "did you mean 'requeue.give_up_after'?"),
        ({"sbatch_options": ["--wrap=$(x)"]}, "is not of the form"),
    ],
)
def test_what_a_site_may_not_say(site: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        from_dict(Cluster, site)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"run": ""}, "run is empty"),
        ({"run": "train dit 'x"}, "no closing quotation"),
        ({"run": "train dit x AKIAABCDEFGHIJKLMNOP"}, "looks like a credential"),
        ({"run": "train dit x --nproc 8"}, "give ranks_per_node instead"),
        ({"run": "train dit x", "array": 2}, "only encode can be split"),
        ({"run": "eval x", "nodes": 2}, "runs in one process"),
        ({"run": "train dit x", "nodes": 2, "min_nodes": 3}, "must be from 1 to nodes 2"),
        ({"run": "train dit x", "after": ["b"]}, "is no stage above it"),
        ({"run": "train dit x", "node": 2}, "did you mean 'stages.a.nodes'"),
    ],
)
def test_what_a_stage_may_not_say(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(Pipeline, {"name": "p", "folder": "runs/p", "stages": {"a": stage}})


def test_a_limit_leaves_time_to_save() -> None:
    plan = pipeline("train dit x", time="00:06:00")
    with pytest.raises(ConfigError, match="time 00:06:00 is no more than save_s 300 and a minute"):
        render(plan, "dit", Cluster(), PLACE)
    assert render(plan, "dit", Cluster(save_s=299), PLACE)


@pytest.mark.parametrize(
    ("time", "expected"), [("90", 5400), ("2:30", 150), ("01:00:05", 3605), ("1-2", 93600), ("1-0:30", 88200)]
)
def test_times_are_slurms(time: str, expected: int) -> None:
    assert seconds(time) == expected


def test_stages_follow_one_another_unless_told() -> None:
    _, plan = load_recipe("digits-pipeline", ["stages.dit.after=[autoencoder]"], {"pipeline": Pipeline})
    assert [plan.after(name) for name in ("data", "autoencoder", "dit", "eval")] == [
        *((), ("data",), ("autoencoder",), ("dit",))
    ]


def test_where_the_site_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DARKROOM_CLUSTER", raising=False)
    with pytest.raises(ConfigError, match="give --cluster FILE"):
        load_cluster()
    (tmp_path / "there.yaml").write_text("partition: there")
    (tmp_path / "cluster.yaml").write_text("partition: here")
    assert load_cluster().partition == "here"
    monkeypatch.setenv("DARKROOM_CLUSTER", str(tmp_path / "there.yaml"))
    assert load_cluster().partition == "there"
    assert load_cluster("cluster.yaml").partition == "here"
    with pytest.raises(ConfigError, match="gone.yaml does not exist"):
        load_cluster("gone.yaml")
