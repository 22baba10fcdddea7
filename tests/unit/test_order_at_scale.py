"""4,096 ranks x 8 workers over 100,000 shards: even shares, whole epochs, a small cursor."""

import json
from pathlib import Path

import numpy as np

from benchmarks.order import SHARDS, STREAMS, check_balance, check_epochs, check_resume, made_up_index, order_of
from data.index import load_index
from data.streams import Cursor


def test_a_large_cluster(tmp_path: Path) -> None:
    made_up_index(str(tmp_path), np.random.Generator(np.random.PCG64(1)))
    order = order_of(load_index(str(tmp_path)))
    check_balance()
    fewest, most = check_epochs(order)
    mean = 4 * sum(order.shard_samples) / STREAMS
    assert 0.8 * mean < fewest and most < 1.2 * mean
    check_resume(order)


def test_its_cursor_stays_below_a_megabyte() -> None:
    positions = dict.fromkeys(range(STREAMS), ((123, 4999), (45, 3999)))  # two data sets
    cursor = Cursor(micro_batches=STREAMS * 10**6, positions=positions)
    text = json.dumps(cursor.to_dict())
    assert len(text) < 1_000_000 and SHARDS == 100_000
    assert Cursor.from_dict(json.loads(text)) == cursor
