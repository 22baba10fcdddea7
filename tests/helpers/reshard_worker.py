"""Reads a run's newest commit into one engine and saves it from there at once, under the next step's number.

Usage: reshard_worker.py CHECKPOINTS STAGE, as one rank or several. On the way the weights that compute are compared
with the masters.
"""

import os
import sys
from pathlib import Path

from launch.runtime import become_single_rank, is_rank_process, ranks
from models.artifact import config_from_dict
from models.dit import DiT, DiTConfig
from training.checkpoint import CheckpointConfig, Checkpointer
from training.ema import EMA, EMAConfig
from training.engine import Engine, EngineConfig
from training.optim import OptimConfig

EMAS = EMAConfig(decays=(0.9, 0.5), sigma_rels=(0.1,))


def main() -> None:
    if not is_rank_process():
        become_single_rank()
    checkpoints, stage = sys.argv[1], int(sys.argv[2])
    world_size = ranks().world_size
    config = EngineConfig(zero_stage=stage, precision="float32", micro_batch_size=1, global_batch_size=world_size)  # type: ignore[arg-type]
    engine = Engine(config, world_size)
    keeper = Checkpointer(Path(checkpoints).parent, CheckpointConfig(keep_last=100), engine)
    snapshot = keeper.newest()
    assert snapshot is not None
    dit = DiT(config_from_dict(DiTConfig, snapshot.state["pipeline"]["dit"], checkpoints))
    dit.init_weights(12345)  # other values than those that are read
    engine.shard(dit, OptimConfig(learning_rate=1e-3))
    ema = EMA(EMAS, engine.weight_fragments())

    def groups():
        return {"model": engine.weight_fragments(), **ema.groups(), **engine.moment_fragments()}

    snapshot.restore(groups())
    engine.refresh_weights()
    keeper.save(snapshot.step + 1, groups(), snapshot.state)
    keeper.finish()
    engine.close()


if __name__ == "__main__":
    main()
    os._exit(0)
