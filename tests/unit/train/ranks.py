"""Runs a function on several processes joined by gloo, with no Ray: quick, and no cluster.

The ranks are forked from a server that has loaded the libraries once; loading takes each of them
fifteen seconds otherwise.
"""

from __future__ import annotations

import gc
import os
import socket
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

# The last one DeepSpeed imports late; with it comes torch's compiler.
LIBRARIES = [
    "components.train.worker",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


def _entry(
    rank: int,
    world: int,
    port: int,
    out: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server has that of the moment when it was started
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    gc.freeze()  # DeepSpeed collects garbage often, and would go through all libraries
    torch.set_num_threads(1)
    from components.train.engines import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    torch.save(function(*args), f"{out}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `function(*args)` on `world` ranks; returns what each rank returned, by rank."""
    multiprocessing.set_forkserver_preload(LIBRARIES)
    forkserver.ensure_running()  # it takes seconds, in which others would take the port
    with socket.socket() as free, tempfile.TemporaryDirectory() as out:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = (world, port, out, dict(os.environ), function, args)
        multiprocessing.start_processes(_entry, arguments, world, start_method="forkserver")
        return [torch.load(Path(out) / f"{rank}.pt", weights_only=False) for rank in range(world)]
