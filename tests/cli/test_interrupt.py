"""Ctrl-C at the command line: it ends in two seconds, whatever it waits for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fault_server import Reply, serve
from PIL import Image

#: Seconds that a command may take to end.
ENDS_IN = 2.0


def interrupted(command: list[str], is_ready, **environment: str) -> tuple[int, float, str]:
    """Exit status of a command, the seconds that it took to end once it was ready and interrupted, and its errors."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **environment}
    )
    try:
        deadline = time.monotonic() + 120
        while not is_ready():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.05)
        time.sleep(0.3)
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        return process.returncode, time.monotonic() - pressed, errors
    finally:
        process.kill()


def trickle(handler) -> None:
    """A byte now and then, without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.2)


@pytest.mark.parametrize("answered", [0, 3])
def test_a_silent_endpoint_keeps_no_command(tmp_path, answered):
    """What was answered before is kept: a second run asks for the rest alone."""
    for part, first in (("support", 0), ("queries", 8)):
        (tmp_path / part).mkdir()
        rows = [{"image": f"{i}.png", "prompt": f"what {i}", "response": f"r{i}"} for i in range(first, first + 8)]
        for i, row in enumerate(rows, first):
            Image.new("RGB", (32, 32), (15 * i, 9, 9)).save(tmp_path / part / row["image"])
        (tmp_path / part / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with serve() as server:
        server.script = [Reply() for _ in range(answered)]
        server.rule = lambda body: Reply(write=trickle)
        command = [sys.executable, "-m", "drum_hf.cli", "eval", "--data", f"{tmp_path}/support"]
        command += ["--queries", f"{tmp_path}/queries", "--strategies", "zero-shot", "--shots", "1"]
        command += ["--endpoint", server.url, "--lvlm", "tiny"]
        command += ["--store", str(tmp_path / "s.sqlite"), "--concurrency", "2"]
        status, seconds, errors = interrupted(command, lambda: len(server.bodies) == answered + 2, HF_HUB_OFFLINE="1")
        assert status == 130 and seconds < ENDS_IN, errors
        assert "run the same command again" in errors and "Traceback" not in errors
        server.rule = lambda body: None
        asked = len(server.bodies)
        again = subprocess.run(command, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120)
        assert again.returncode == 0 and len(server.bodies) == asked + 8 - answered


STUBBORN = """
import sys, threading, time, types
import drum_hf.cli as cli

def wait(args):
    open(sys.argv[1], "w").close()
    {wait}

def add(commands):
    commands.add_parser("wait", help="waits").set_defaults(run=wait)

cli._VERBS = (types.SimpleNamespace(add=add),)
sys.exit(cli.main(["wait"]))
"""


@pytest.mark.parametrize(
    "wait",
    [
        "time.sleep(60)",
        "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",  # another thread keeps the process
        "import re; re.match('(a*)*b', 'a' * 40)",  # native code, between whose steps Python raises nothing
        "\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass",
    ],
    ids=["sleep", "thread", "native", "swallowed"],
)
def test_nothing_holds_it_up(tmp_path, wait):
    ready = tmp_path / "ready"
    script = STUBBORN.format(wait=wait)
    status, seconds, errors = interrupted([sys.executable, "-c", script, str(ready)], ready.exists)
    assert status == 130 and seconds < ENDS_IN, errors
    assert "run the same command again" in errors
