"""A run on data with too many unusable samples: masked and recorded while the budget lasts, then stopped by name."""

import io
import json

import pytest
from PIL import Image

from data.shards import write_shards
from tests.helpers.warm_ranks import darkroom

REASONS = ("not a readable JPEG, PNG or WebP", "empty caption", "not UTF-8")


@pytest.fixture(scope="module")
def rotten(tmp_path_factory):
    """200 samples in 10 shards; a third of the sixth shard's and of the seventh's cannot be used."""
    folder = tmp_path_factory.mktemp("rotten")

    def samples():
        for number in range(200):
            out = io.BytesIO()
            Image.new("RGB", (32, 32), (number, 90, 20)).save(out, "PNG")
            sample = {"__key__": f"{number:04d}", "png": out.getvalue(), "txt": f"number {number}".encode()}
            if 100 <= number < 140 and number % 3 == 0:
                kind = number % 4 % 3
                sample[("png", "txt", "txt")[kind]] = (b"<html>404</html>", b" \n", b"\xff\xfe")[kind]
            yield sample

    write_shards(samples(), str(folder), "r", 20)
    return folder


def test_over_the_budget_the_run_stops_and_names_the_shard(world, rotten, tmp_path):
    run = tmp_path / "run"
    changes = (f"data.shards={rotten}", "data.max_bad_fraction=0.005", "data.num_streams=2", "samples.prompts=[]")
    result = darkroom("train", "dit", world.dit, "--run", run, *changes, "total_steps=25")
    assert result.code == 2, result.err
    (line,) = result.error_lines
    assert "most of them in r-00000" in line and "data.max_bad_fraction 0.005" in line and "bad_samples-" in line
    records = [json.loads(row) for row in (run / "bad_samples-0.jsonl").read_text().splitlines()]
    assert len(records) == 6  # 5 of 1000 are allowed
    assert all(record["shard"] in ("r-000005.tar", "r-000006.tar") for record in records)
    assert all(any(reason in record["reason"] for reason in REASONS) for record in records)
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["bad_samples"] == 6 and all(row["loss"] > 0 for row in rows)
