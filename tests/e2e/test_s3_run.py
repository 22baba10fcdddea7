"""A run whose data and checkpoints live in a bucket behind a real HTTP endpoint on loopback."""

import os
import shutil

import pytest

from data.object_store import S3Store, put_tree
from tests.helpers.fault_proxy import Fault, FaultProxy
from tests.helpers.s3_servers import moto_server, use_endpoint
from tests.helpers.warm_ranks import darkroom
from training.metrics import read_metrics

FAULTS = (
    Fault("reset", method="GET", path=".tar", after_bytes=2000, times=3),
    Fault("503", method="GET", path=".tar", first=5),
    Fault("cut", method="GET", path=".safetensors", after_bytes=5000),
    Fault("500", method="PUT", path=".safetensors", times=2),
    Fault("lost_answer", method="PUT", path="manifest.json", times=2),
)


@pytest.fixture
def proxy(monkeypatch):
    """Stands before a server with the bucket "lab"."""
    with moto_server() as server, FaultProxy(server) as started:
        use_endpoint(monkeypatch, started.url, secret="canary-secret-of-the-test")
        S3Store("lab").client.create_bucket(Bucket="lab")
        yield started


@pytest.mark.all
def test_killed_run_resumes_from_nothing_but_the_bucket_with_the_same_curve(world, proxy, tmp_path):
    """On a machine that has neither the run directory nor the autoencoder that the recipe names."""
    bucket = "s3://lab"
    put_tree(world.data / "train", f"{bucket}/train")
    local, remote, autoencoder = tmp_path / "local", tmp_path / "remote", tmp_path / "autoencoder"
    shutil.copytree(world.autoencoder, autoencoder)
    base = ("train", "dit", world.dit, "--nproc", 2, f"autoencoder={autoencoder}")
    assert darkroom(*base, "--run", local).code == 0
    there = (*base, "--run", remote, f"data.shards={bucket}/train", f"checkpoint.url={bucket}/run/checkpoints")
    proxy.plan(*FAULTS)
    assert darkroom(*there, die="log:6:0").code != 0
    before = {name: (remote / name).read_bytes() for name in ("run.yaml", "frozen/text_encoders/config.json")}
    shutil.rmtree(remote)
    shutil.rmtree(autoencoder)
    resumed = darkroom(*there)
    assert resumed.code == 0, resumed.err
    assert "going on with the networks that the run keeps" in resumed.err
    assert {name: (remote / name).read_bytes() for name in before} == before
    assert darkroom("data", "ledger", remote).code == 0
    assert f"resuming {remote} at step 4" in resumed.err
    rows = [
        [{k: row[k] for k in ("step", "loss")} for row in read_metrics(run / "metrics.jsonl")]
        for run in (local, remote)
    ]
    assert rows[0] == rows[1]
    assert {seen.fault for seen in proxy.seen} == {"", *(fault.kind for fault in FAULTS)}
    assert not (remote / "checkpoints").exists()
    listing = darkroom("checkpoint", "ls", f"{bucket}/run/checkpoints")
    assert listing.code == 0 and "4" in listing.out and "8" in listing.out
    drawn = darkroom(
        *("sample", f"{bucket}/run/checkpoints/step-00000004", "--prompt", "a red seven", "--steps", 2),
        *("--out", tmp_path / "drawn"),
    )
    assert drawn.code == 0, drawn.err
    other = darkroom(*there, "--run", tmp_path / "other", "seed=5")
    assert other.code == 2 and "was started with seed = 0, the recipe now says 5" in other.err
    written = [path for path in remote.rglob("*") if path.is_file()]
    assert written and not any(os.environ["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes() for path in written)
