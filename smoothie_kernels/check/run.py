"""Runs probes, each in a process of its own, or all in this one; and how each has ended."""

import json
import os
import tempfile
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smoothie_kernels.check.findings import Findings
from smoothie_kernels.check.isolate import Call, Ended, run_calls, signal_name
from smoothie_kernels.check.machine import use_library
from smoothie_kernels.check.probes import Probe

# A launch then fails where it was made; deterministic cuBLAS wants its workspace named.
WAIT = {"CUDA_LAUNCH_BLOCKING": "1", "HIP_LAUNCH_BLOCKING": "1"}
ALWAYS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
MESSAGE = 600  # characters of an error's


class Result(NamedTuple):
    probe: str
    backend: str
    outcome: str  # ok, wrong, error, crash, hang
    seconds: float
    found: Mapping[str, Any]  # cases, figures; what is wrong; message and tail of the output where it is not ok

    def json(self) -> str:
        line = {**self._asdict(), **self.found, "seconds": round(self.seconds, 2)}
        return json.dumps({name: value for name, value in line.items() if name != "found"})


def run_isolated(probes: Sequence[Probe], at_once: int, start: str = "forkserver") -> Generator[Result]:
    """Each as it ends; isolate.run_calls has `start`."""
    threads = max(1, (os.cpu_count() or 1) // at_once)
    with tempfile.TemporaryDirectory(prefix="smoothie-check-") as folder:
        calls, of = [], {}
        for i, probe in enumerate(probes):
            path, log = Path(folder, f"{i}.json"), Path(folder, f"{i}.txt")
            env = ALWAYS if probe.as_used else ALWAYS | WAIT
            of[log] = probe, path
            calls.append(Call(run_probe, (probe, path, threads), probe.seconds, log, env))
        for call, ended in run_calls(calls, at_once, start):
            yield result_of(*of[call.log], ended)


def run_here(probes: Sequence[Probe]) -> Generator[Result]:
    """One after the other in this process: for compute-sanitizer, whose start takes long. Without those that call as a
    user does: large, and with streams and graphs that the checkers do not take."""
    with tempfile.TemporaryDirectory(prefix="smoothie-check-") as folder:
        for probe in probes:
            if not probe.as_used:
                begin, path = time.monotonic(), Path(folder, "found.json")
                run_probe(probe, path, torch.get_num_threads(), watchdog=False)
                yield result_of(probe, path, Ended(0, time.monotonic() - begin, ""))


def run_probe(probe: Probe, path: Path, threads: int, watchdog: bool = True) -> None:
    """In the probe's process. Writes its outcome to `path`."""
    found = Findings(path)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # torch.empty gives NaN and the largest integer: what no kernel wrote cannot look right. (The usual call of the same
    # name, use_deterministic_algorithms, imports the compiler: seconds a process.)
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        use_library(probe.target, watchdog and not probe.as_used)
        probe.function(found, probe.target, **probe.arguments)
        if probe.target.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"[:MESSAGE]
        found.write("crash" if probe.target.device == "cuda" and _is_lost() else "error", message)
    else:
        found.write("wrong" if found.count_wrong else "ok")


def _is_lost() -> bool:
    """After an illegal access, a trap or a failed launch a process cannot use the GPU any more."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def result_of(probe: Probe, path: Path, ended: Ended) -> Result:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.unlink(missing_ok=True)
    outcome, message = found.pop("outcome", None), found.pop("message", "")
    if ended.code is None:
        outcome, message = "hang", str(ended)
    elif ended.code < 0:
        outcome, message = "crash", f"killed by {signal_name(-ended.code)}"
    elif outcome is None:
        outcome, message = "error", f"{ended}, before it had a result"
    if outcome == "ok":
        found = {name: found[name] for name in ("cases", "figures")}
    else:
        found |= {"message": message, "tail": ended.tail}
    return Result(probe.name, probe.target.backend, outcome, ended.seconds, found)
