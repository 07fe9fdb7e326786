"""Faults for `benchmarks.device`: a stand-in for a GPU whose first case has a contestant of each kind of fault."""

import os
import signal
import time
from dataclasses import replace

import torch

from benchmarks import rates, registry
from benchmarks.contestants import CONTESTANTS
from benchmarks.inputs import Outputs

CASES = STEP, NEAREST, RATES = "gpu-step-n16384-v28996-d768-bf16", "gpu-nearest-n16384-v28996-d768-bf16", rates.CASE
RIGHT, WRONG, RAISES, CRASHES, HANGS = "fused[reference]", "fused", "fused, raw table", "fused[cpu]", "eager"
ALL = (RIGHT, WRONG, RAISES, CRASHES, HANGS, "chunked")


def wrong(given):
    return lambda: Outputs(torch.zeros_like(given.x))


def raises(given):
    raise RuntimeError("planted")


def crashes(given):
    return lambda: os.kill(os.getpid(), signal.SIGSEGV)


def hangs(given):
    return lambda: time.sleep(1000)


def prepare():
    for name in (STEP, NEAREST):
        registry.CASES[name] = replace(registry.CASES[name], n=5, v=60, d=16, contestants=(RIGHT, "chunked"))
    registry.CASES[STEP] = replace(registry.CASES[STEP], contestants=ALL)
    for name, fault in ((WRONG, wrong), (RAISES, raises), (CRASHES, crashes), (HANGS, hangs)):
        faulty = {**CONTESTANTS[name].prepare, "step": fault}
        CONTESTANTS[name] = replace(CONTESTANTS[name], prepare=faulty)
    rates.SQUARE["cpu"], rates.COPIED["cpu"] = 64, 2**16
