"""Peak memory of one call.

The kernel keeps a process's high-water mark of resident memory and resets it on request, so nothing is sampled.
README.md says what counts and what does not.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.common.embeddings import Material
from benchmarks.step import inputs
from benchmarks.step.cases import Case
from benchmarks.step.contestants import CONTESTANTS
from benchmarks.step.inputs import Call

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NO_MARK = "this system keeps no high-water mark that can be reset"
TIMEOUT = 180  # seconds for one call with all that comes before it


@dataclass(frozen=True)
class Peak:
    extra: int  # bytes beyond the inputs, outputs included
    process: int | None = None  # bytes of the whole process, the inputs and PyTorch itself included


def peak_in_new_process(case: Case, contestant: str, material: Path, threads: int) -> Peak | str:
    """The peak of making and running a call, or why it was not measured. `material` is a saved Material."""
    if not RESET.exists():
        return NO_MARK
    context = multiprocessing.get_context("forkserver")
    # The first call of any custom operator imports torch._dynamo; here it is imported once for all processes.
    context.set_forkserver_preload(["benchmarks.common.memory", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, case, contestant, material, threads), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT):
            return f"no answer within {TIMEOUT} s"
        answer: Peak | str = receiver.recv()
        return answer
    except EOFError:
        return "the measuring process died (out of memory?)"
    finally:
        process.join(5)
        process.kill()


def _measure(sender: Connection, case: Case, name: str, material: Path, threads: int) -> None:
    try:
        sender.send(_peak_here(case, name, material, threads))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _peak_here(case: Case, name: str, material: Path, threads: int) -> Peak | str:
    torch.set_num_threads(threads)
    prepare = CONTESTANTS[name].prepare[case.op]
    with inputs.grad_mode(case):
        given = inputs.build(case, Material.load(material))
        prepare(given.cut(2, 64))()
        return peak_of(lambda: prepare(given)())


def peak_of(call: Call) -> Peak | str:
    """The peak of a call in this process. What an earlier call left behind for the next one does not count."""
    if not RESET.exists():
        return NO_MARK
    gc.collect()
    _give_back_free_memory()
    before = _resident()
    RESET.write_text("5")
    outputs = call()
    after = _resident()
    del outputs
    program_code = max(0, after["RssFile"] - before["RssFile"])
    return Peak(max(0, after["VmHWM"] - before["VmRSS"] - program_code), after["VmHWM"])


def _resident() -> dict[str, int]:
    """Bytes by field of /proc/self/status."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _give_back_free_memory() -> None:
    """What malloc keeps of freed blocks would be used again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_on_cuda(call: Call) -> Peak:
    """The allocator's own high-water mark."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del outputs
    return Peak(peak - before, peak)


def available(device: str) -> int | None:
    """Bytes that can still be taken, None where unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = (line.split() for line in meminfo.read_text().splitlines())
    return next(int(words[1]) * 1024 for words in fields if words[0] == "MemAvailable:")
