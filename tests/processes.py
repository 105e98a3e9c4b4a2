"""Several real processes of one script, as a launcher starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def run_processes(
    folder: Path, *arguments: str, script: str = "two_processes.py", count: int = 2
) -> tuple[list[int], list[dict | None]]:
    """Exit statuses and results of all."""
    launch = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(folder), *arguments],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **launch),
            stdout=subprocess.DEVNULL,
            stderr=open(folder / f"log{rank}", "w"),  # noqa: SIM115
        )
        for rank in range(count)
    ]
    try:
        statuses = [process.wait(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    files = [folder / f"result{rank}.json" for rank in range(count)]
    return statuses, [json.loads(file.read_text()) if file.exists() else None for file in files]
