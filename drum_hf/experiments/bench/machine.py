"""The machine that a benchmark runs on: what it is, how fast it multiplies, and how much memory some work takes."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Measured", "describe_machine", "measure_gemm", "measure_memory", "resident_mb"]

#: (m, k, n) of the matrix products that are tried: token batches times the widths of small and of large models, and
#: squares. The best of them counts as what the machine can do.
GEMM_SIZES = ((512, 768, 768), (512, 768, 3072), (1024, 1024, 1024), (1024, 3072, 1024), (2048, 2048, 2048))
#: On a GPU small products measure the launch, not the arithmetic.
GPU_GEMM_SIZES = ((4096, 4096, 4096), (8192, 4096, 4096), (8192, 8192, 8192))


def measure_gemm(
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    sizes: Sequence[tuple[int, int, int]] | None = None,
    repeats: int = 7,
) -> float:
    """What one matrix product attains here: the floor that a model's arithmetic is held against.

    Args:
        dtype: of both factors.
        device: where; threads are as torch has them now.
        sizes: (m, k, n) of the products tried. None: typical ones for the device.
        repeats: timings of each, after one to warm up; their median counts.

    Returns:
        FLOP/s (two for a multiplication and addition) of the best size.
    """
    import torch

    device = torch.device(device)
    best = 0.0
    for m, k, n in sizes or (GPU_GEMM_SIZES if device.type == "cuda" else GEMM_SIZES):
        left = torch.randn(m, k, device=device).to(dtype)
        right = torch.randn(k, n, device=device).to(dtype)
        seconds = [_seconds(functools.partial(torch.matmul, left, right), device) for _ in range(repeats + 1)][1:]
        best = max(best, 2.0 * m * k * n / statistics.median(seconds))
    return best


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a function returned and the memory it took.

    Attributes:
        result: the function's.
        peak_mb: most memory that was in use at once, in MiB: the process's, interpreter and libraries included; on a
            GPU the tensors'.
    """

    result: Any
    peak_mb: float


def measure_memory(
    function: Callable[..., Any], /, *args: Any, device: str | torch.device = "cpu", **kwargs: Any
) -> Measured:
    """Call a function and measure its peak memory.

    On the CPU it is called in a fresh process, whose memory holds nothing else; it must be a module's own function,
    its arguments and result must be picklable, and the script that starts it needs `if __name__ == "__main__"`. On a
    GPU it is called here.

    Raises:
        RuntimeError: the process ended without a result, as one killed for memory does.
        Exception: whatever the function raised.
    """
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        result = function(*args, **kwargs)
        return Measured(result, torch.cuda.max_memory_allocated(device) / 2**20)
    ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_report, args=(theirs, function, args, kwargs))
    process.start()
    theirs.close()
    try:
        outcome, peak = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process that measures {function.__name__} ended without a result (exit code {process.exitcode}); "
            "-9 means that it was killed, as a rule for memory: measure a smaller size"
        ) from None
    process.join()
    if isinstance(outcome, BaseException):
        raise outcome
    return Measured(outcome, peak)


def _report(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        outcome = function(*args, **kwargs)
    except Exception as error:
        outcome = error
    pipe.send((outcome, _status_mb("VmHWM")))


def resident_mb() -> float:
    """Memory of this process now, in MiB; what was freed is given back to the system first, where it can be."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return _status_mb("VmRSS")


def _status_mb(entry: str) -> float:
    """VmRSS or VmHWM (the peak) of this process in MiB; where the system does not tell, its peak so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a process inherits the peak of the one that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{entry}:"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def describe_machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """CPU, cores, threads, memory, versions and the GPU's name, for a report."""
    import torch

    device = torch.device(device)
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
