"""A run whose data and checkpoints live in a bucket behind a real HTTP endpoint on loopback."""

import os

import pytest

from data.object_store import put_tree
from tests.helpers.command import darkroom
from training.metrics import read_metrics

moto = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch):
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "canary-secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="lab")
    yield "s3://lab"
    server.stop()


def test_killed_run_resumes_from_the_bucket_with_the_same_curve(world, bucket, tmp_path):
    put_tree(world.data / "train", f"{bucket}/train")
    local, remote = tmp_path / "local", tmp_path / "remote"
    base = ("train", "dit", world.dit, "--nproc", 2)
    assert darkroom(*base, "--run", local).code == 0
    there = (*base, "--run", remote, f"data.shards={bucket}/train", f"checkpoint.url={bucket}/run/checkpoints")
    assert darkroom(*there, die="log:6:0").code != 0
    resumed = darkroom(*there)
    assert resumed.code == 0, resumed.err
    assert f"resuming {remote} at step 4" in resumed.err
    rows = [
        [{k: row[k] for k in ("step", "loss")} for row in read_metrics(run / "metrics.jsonl")]
        for run in (local, remote)
    ]
    assert rows[0] == rows[1]
    assert not (remote / "checkpoints").exists()
    listing = darkroom("checkpoint", "ls", f"{bucket}/run/checkpoints")
    assert listing.code == 0 and "4" in listing.out and "8" in listing.out
    written = [path for path in remote.rglob("*") if path.is_file()]
    assert written and not any(os.environ["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes() for path in written)
