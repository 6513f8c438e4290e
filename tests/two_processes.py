"""Two real processes that share a gloo process group and run functions on demand, for the tests."""

from __future__ import annotations

import multiprocessing as mp
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds until a pair that does not answer counts as hanging


class TwoProcesses:
    """Starts two processes once, since that takes longer than the tests do.

    Args:
        folder: where the processes find each other.
    """

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "rendezvous"), theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(rank, *args)` on both; return the two results, an exception's text in place of a result."""
        for pipe in self.pipes:
            pipe.send((function, args))
        return [self._receive(pipe) for pipe in self.pipes]

    def _receive(self, pipe: Connection) -> Any:
        if not pipe.poll(PATIENCE):
            self.stop()
            raise TimeoutError(f"A process has not answered for {PATIENCE} seconds: the two wait for each other.")
        return pipe.recv()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, rendezvous: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send(function(rank, *args))
        except Exception:
            pipe.send(traceback.format_exc())


def launch(script: Path, *arguments: str, launcher: str = "torchrun") -> str:
    """Run a script in two processes by a launcher; return what it printed.

    `accelerate launch --cpu --num_processes 2` would start one process only, so the launcher for several GPUs is
    asked for; the script itself chooses the CPU.
    """
    module = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        "python": ["runpy"],
    }[launcher]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", *module, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return done.stdout + done.stderr
