"""One command, or one function, in a process group of its own: with a time limit, and its output in a file.

What is stopped at its limit first says where it stands (SIGINT, or the stacks of all its threads), then it is killed
with all processes that it has started.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

TAIL = 40  # lines of output
GRACE = 10.0  # seconds after SIGINT: pytest prints its failures
STACKS = 0.5  # seconds after the signal that writes stacks
SPARE = 30  # seconds beyond the limit, after which a process whose watcher is gone ends by itself
# What the server of processes imports, because it takes seconds: torch, the package, and torch's compiler, which torch
# imports with the first call of a custom operator. None of them touches a GPU: after a fork it could not be used.
PRELOAD = ["smoothie_kernels.testing", "torch._dynamo"]


@dataclass(frozen=True)
class Ended:
    """How a process has ended."""

    code: int | None  # its exit code, or minus the signal that killed it; None: stopped at the limit
    seconds: float
    tail: str  # the last lines of its output

    def __str__(self) -> str:
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        return f"killed by {signal_name(-self.code)}" if self.code < 0 else f"exit code {self.code}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def run_command(
    command: Sequence[str], seconds: float, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Ended:
    """Runs it with its output in `log`, and `env` beside this process's environment."""
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(code, time.monotonic() - begin, tail_of(log))


@dataclass(frozen=True)
class Call:
    """A function of a module, which gives nothing back: what it finds, it writes to a file."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    seconds: float
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)


def run_calls(calls: Iterable[Call], at_once: int, start: str = "forkserver") -> Iterator[tuple[Call, Ended]]:
    """Each as it ends; they begin in order. "forkserver" forks them from a server that has imported PRELOAD, in 0.1 s
    each; with "spawn" every process imports it itself, in seconds."""
    context: Any = multiprocessing.get_context(start)
    context.set_forkserver_preload(PRELOAD)
    waiting, running = deque(calls), dict[int, _Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                call = waiting.popleft()
                process = context.Process(target=_enter, args=(call,))
                process.start()
                running[process.sentinel] = _Running(call, process, cast(int, process.pid), time.monotonic())
            left = min(each.begin + each.call.seconds for each in running.values()) - time.monotonic()
            connection.wait(list(running), max(0.0, left))
            for sentinel, each in list(running.items()):
                code, seconds = each.process.exitcode, time.monotonic() - each.begin
                if code is None and seconds < each.call.seconds:
                    continue
                if code is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each.pid, signal.SIGUSR1)
                    each.process.join(STACKS)
                each.end()
                del running[sentinel]
                yield each.call, Ended(code, seconds, tail_of(each.call.log))
    finally:
        for each in running.values():
            each.end()


@dataclass(frozen=True)
class _Running:
    call: Call
    process: BaseProcess
    pid: int  # of the process and, once it has one, of its group
    begin: float

    def end(self) -> None:
        _signal_group(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def tail_of(log: Path) -> str:
    if not log.exists():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])


def _enter(call: Call) -> None:
    """Of the new process."""
    os.setsid()
    os.environ.update(call.env)
    output = os.open(call.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    signal.alarm(int(call.seconds) + SPARE)
    call.function(*call.arguments)
    sys.stdout.flush()


def _signal_group(group: int, number: signal.Signals) -> None:
    """Those of its processes that are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
