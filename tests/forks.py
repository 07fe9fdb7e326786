"""Processes for tests, forked from one that has imported everything: they start at once."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count

DEATH = 9
CHANGES = {
    "open", "write", "writelines", "flush", "fsync", "truncate", "mkdir", "remove", "rename", "replace", "rmdir",
    "unlink",
}  # fmt: skip


def start(function: Callable[[], object]) -> int:
    """Its process; exit status 0, the function's own if it is a number, or 1 after an exception."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        status = int(function() or 0)
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end(process: int, seconds: float = 120) -> int:
    """Exit status, or the signal's negative number; that of SIGKILL for one that hangs."""
    late = time.monotonic() + seconds
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > late:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])


def deaths(function: Callable[[], object]) -> Iterator[int]:
    """Runs it until it dies before its first, second, ... call that changes a file; ends when it survives."""
    for moment in count(1):

        def dying(moment: int = moment) -> None:
            seen = count(1)

            def watch(_: object, event: str, what: object) -> None:
                if event == "c_call" and what.__name__ in CHANGES and next(seen) == moment:
                    os._exit(DEATH)

            sys.setprofile(watch)
            function()

        status = end(start(dying))
        if status == 0:
            assert moment > 1
            return
        assert status == DEATH, status
        yield moment


def ranks(function: Callable[[], object], number: int) -> list[int]:
    """Exit statuses of `number` ranks that are connected as those of torchrun are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(k: int) -> Callable[[], object]:
        def run() -> object:
            from accelerate import PartialState
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
            size = {"RANK": k, "LOCAL_RANK": k, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
            os.environ |= {name: str(value) for name, value in size.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            return function()

        return run

    return [end(process) for process in [start(rank(k)) for k in range(number)]]
