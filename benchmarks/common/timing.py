"""Time: all contestants of a case in turn, again and again, so that a machine's moods fall on all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]

MOST = 25  # timed runs of a call, where --repeats does not say
FEWEST = ((1.0, 5), (3.0, 2))  # at least so many where one takes less than so many seconds; else one
SLOW = 1.0  # seconds: a longer first run needs no warm-up beyond the check's, and counts
WARM_UP = 2  # runs of a call before a graph is captured
FLUSH_BYTES = 256 * 2**20  # more than any GPU's last-level cache


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    quartiles: tuple[float, float]
    runs: int

    def scaled(self, factor: float) -> "Timing":
        first, third = self.quartiles
        return Timing(factor * self.median, (factor * first, factor * third), self.runs)


def wall_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_clock() -> Clock:
    """Events around the call, with the GPU's cache emptied before. An untimed call goes ahead: while the GPU works on
    it the host issues the timed one, as in a loop without waits."""
    event: Any = torch.cuda.Event
    rubbish = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def clock(call: Call) -> float:
        start, end = event(enable_timing=True), event(enable_timing=True)
        call()
        rubbish.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return clock


def clock_of(device: str) -> Clock:
    return cuda_clock() if device == "cuda" else wall_clock


def race(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    patience: float,
    repeats: int | None = None,
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Runs every call for about `patience` seconds in all, between FEWEST and MOST times, or `repeats` times.

    Rounds go through all calls in order; one with fewer runs than there are rounds sits out evenly. Every call must
    have run before. `on_turn` gets the name of each call before it runs.
    """

    def timed(name: str) -> float:
        on_turn(name)
        return clock(calls[name])

    if not calls:
        return {}
    gc.collect()
    first = {name: timed(name) for name in calls}
    samples = {name: [seconds] if seconds > SLOW else [] for name, seconds in first.items()}
    runs = {}
    for name, seconds in first.items():
        fewest = next((runs for below, runs in FEWEST if seconds < below), 1)
        often = repeats or min(max(int(patience / seconds), fewest), MOST)
        runs[name] = often - len(samples[name])
    rounds = max(runs.values())
    gc.disable()
    try:
        for k in range(rounds):
            for name in calls:
                if (k + 1) * runs[name] // rounds > k * runs[name] // rounds:
                    samples[name].append(timed(name))
    finally:
        gc.enable()
    return {name: summary(times) for name, times in samples.items()}


def capture(calls: list[Call]) -> Call:
    """One CUDA graph of all calls, to be replayed."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]

    def replay() -> object:
        graph.replay()
        return outputs  # the graph writes into their memory

    return replay


def summary(times: list[float]) -> Timing:
    first, median, third = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    return Timing(median, (first, third), len(times))
