"""Peak memory of one call.

The kernel keeps a process's high-water mark of resident memory and resets it on request, so nothing is sampled.
README.md says what counts and what does not.
"""

import ctypes
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common.case import SomeCase
from benchmarks.common.embeddings import Material
from benchmarks.common.machine import flush_denormals
from benchmarks.common.timing import Call
from smoothie_kernels.check import isolate

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NO_MARK = "this system keeps no high-water mark that can be reset"
TIMEOUT = 180  # seconds for one call with all that comes before it

# Of a case, the name of a contestant and a material: makes the call that is measured. A small call went ahead, which
# loaded what a first call loads.
Alone = Callable[[SomeCase, str, Material], Call]


@dataclass(frozen=True)
class Peak:
    extra: int  # bytes beyond the inputs, outputs included
    process: int | None = None  # bytes of the whole process, the inputs and PyTorch itself included


def peak_in_new_process(alone: Alone[SomeCase], case: SomeCase, name: str, material: Path, threads: int) -> Peak | str:
    """The peak of the call that `alone` makes, or why it was not measured. `material` is a saved Material; what the
    process says goes into files next to it."""
    if not RESET.exists():
        return NO_MARK
    answer, log = material.with_suffix(".json"), material.with_suffix(".txt")
    answer.unlink(missing_ok=True)
    call = isolate.Call(_measure, (answer, alone, case, name, material, threads), TIMEOUT, log)
    ((_, ended),) = isolate.run_calls([call], at_once=1)
    if answer.exists():
        return Peak(**json.loads(answer.read_text()))
    return f"the measuring process gave no answer: {ended}, {ended.tail.rpartition(chr(10))[2]}"


def _measure(answer: Path, alone: Alone[SomeCase], case: SomeCase, name: str, material: Path, threads: int) -> None:
    flush_denormals()
    torch.set_num_threads(threads)
    peak = peak_of(alone(case, name, Material.load(material)))
    assert isinstance(peak, Peak)  # there is a mark
    answer.write_text(json.dumps(asdict(peak)))


def peak_of(call: Call) -> Peak | str:
    """The peak of a call in this process. What an earlier call left behind for the next one does not count."""
    if not RESET.exists():
        return NO_MARK
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what malloc keeps of freed blocks would be used again unseen
    before = _kilobytes(STATUS)
    RESET.write_text("5")
    outputs = call()
    after = _kilobytes(STATUS)
    del outputs
    program_code = max(0, after["RssFile"] - before["RssFile"])
    return Peak(max(0, after["VmHWM"] - before["VmRSS"] - program_code), after["VmHWM"])


def _kilobytes(path: Path) -> dict[str, int]:
    """Bytes by field of a file whose lines are like "VmRSS: 12 kB"."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


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
        torch.cuda.empty_cache()  # what it keeps does not look free
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    return _kilobytes(meminfo).get("MemAvailable") if meminfo.exists() else None
