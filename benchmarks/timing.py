"""What the benchmarks share: interleaved timing, and a heading that names the machine."""

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def medians(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function, called in turn, so that a busy moment of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def heading() -> str:
    """Processor, threads, versions and date."""
    cpuinfo = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return (
        f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {datetime.date.today().isoformat()}"
    )


def show(title: str, times: dict[str, float], ours: str, per: int = 1) -> None:
    """A row for each function: milliseconds, and how many times as long as ours it takes."""
    print(title)
    for name, seconds in times.items():
        print(f"  {name:44} {1e3 * seconds / per:9.2f} ms  {seconds / times[ours]:7.1f}x")
