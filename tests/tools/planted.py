"""Faults for `benchmarks.hopper`: a stand-in for a GPU whose first case has a contestant of each kind of fault."""

import os
import signal
import time
from dataclasses import replace

import torch

from benchmarks.hopper import rates
from benchmarks.step import cases
from benchmarks.step.contestants import CONTESTANTS
from benchmarks.step.inputs import Outputs

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
        cases.CASES[name] = replace(cases.CASES[name], n=5, v=60, d=16, contestants=(RIGHT, "chunked"))
    cases.CASES[STEP] = replace(cases.CASES[STEP], contestants=ALL)
    for name, fault in ((WRONG, wrong), (RAISES, raises), (CRASHES, crashes), (HANGS, hangs)):
        faulty = {**CONTESTANTS[name].prepare, "step": fault}
        CONTESTANTS[name] = replace(CONTESTANTS[name], prepare=faulty)
    rates.SQUARE["cpu"], rates.COPIED["cpu"] = 64, 2**16
