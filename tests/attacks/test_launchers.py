"""torchrun with two agents of two workers, of which one is killed: the job ends by itself."""

import os
import random
import socket
import subprocess
import sys
import time

import psutil
import pytest
from helpers import contents, tiny

from fastrot.checkpoint.store import unfinished
from fastrot.cli import main

RUNS = max(1, int(os.environ.get("FASTROT_ATTACKS", "0")) // 20)

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(source, target):
    endpoint = f"127.0.0.1:{free_port()}"
    options = ["--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "3"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "fastrot"]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    command += ["-m", "fastrot", "rotate", str(source), str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        for _ in range(2)
    ]


def kill_one(agents, growing, chance):
    """Kill a worker of an unfinished job: one that is about to end could not be replaced."""
    workers = [w for a in agents if a.poll() is None for w in psutil.Process(a.pid).children()]
    for worker in workers:
        worker.suspend()
    if hit := bool(workers) and growing.exists():
        chance.choice(workers).kill()
    for worker in workers:
        worker.resume()
    return hit


def test_a_killed_worker_is_replaced(tmp_path):
    source = tmp_path / "source"
    model = tiny("llama", layers=48, hidden=192, intermediate=448)
    model.save_pretrained(source, max_shard_size="300KB")
    assert main(["rotate", str(source), str(tmp_path / "whole")]) == 0
    whole = contents(tmp_path / "whole")
    chance = random.Random(0)
    killed = 0
    for run in range(RUNS):
        target = tmp_path / str(run)
        agents = launch(source, target)
        while not unfinished(target).exists() and any(agent.poll() is None for agent in agents):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.2))
        killed += kill_one(agents, unfinished(target), chance)
        output = [agent.communicate(timeout=240)[0].decode()[-2000:] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], output
        assert contents(target) == whole
        assert not unfinished(target).exists()
    assert killed
