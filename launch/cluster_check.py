"""`darkroom doctor --cluster`: the check that precedes every attempt, asked for by a person."""

import os
import shutil
import subprocess
import uuid

from launch import slurm_client
from launch.cluster import Cluster
from launch.errors import ConfigError
from launch.pipeline import Stage
from launch.preflight import check_command, judge_nodes, read_facts
from launch.slurm import Place, environment, srun_command
from launch.slurm_ranks import expand_nodes


def check_cluster(cluster: Cluster, place: Place, nodes: int | None) -> tuple[list[str], dict[str, list[str]]]:
    """Checks nodes together.

    Args:
        cluster: the site.
        place: its working folder has to be seen by all nodes.
        nodes: how many; None = all that are idle.

    Returns:
        The nodes that were asked, and the bad ones with the reasons.

    Raises:
        ConfigError: SLURM gives no nodes.
    """
    wanted = [f"--nodes={nodes}"] if nodes else _idle(cluster)
    stage = Stage(run="train", nodes=nodes or 1)
    folder = place.working_folder / f"doctor-{uuid.uuid4().hex[:8]}"
    srun = srun_command(stage, cluster, place)
    command = check_command([srun[0], *wanted, *_allocation(cluster, stage), *srun[1:]], folder, cluster.preflight)
    folder.mkdir()
    try:
        env = slurm_client.submitting_environment({**os.environ, **environment(cluster)})
        limit_s = cluster.preflight.timeout_s
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s + 600)
        facts = read_facts(folder)
        if not facts:
            raise ConfigError(f"srun: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
        asked = sorted({node for fact in facts for node in expand_nodes(fact.step_nodes)})
        return asked, judge_nodes(facts, asked, cluster.preflight)
    except FileNotFoundError:
        raise ConfigError("srun is not installed here; give the command where SLURM's are") from None
    except subprocess.TimeoutExpired:
        raise ConfigError("the nodes were not free for ten minutes; give --nodes N, or come back later") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _idle(cluster: Cluster) -> list[str]:
    nodes = slurm_client.idle_nodes(cluster.partition)
    if not nodes:
        raise ConfigError("no node is idle; give --nodes N to wait for some")
    return [f"--nodelist={','.join(nodes)}", f"--nodes={len(nodes)}"]


def _allocation(cluster: Cluster, stage: Stage) -> list[str]:
    options = [f"--partition={cluster.partition}"] if cluster.partition else []
    options += [f"--account={cluster.account}"] if cluster.account else []
    options += [f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []
    return [*options, "--time=10", "--job-name=darkroom-doctor", *cluster.sbatch_options]
