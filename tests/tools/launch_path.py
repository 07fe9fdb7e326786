"""Calls Triton's own launcher where there is no GPU; run by test_launch_path.py, in a process of its own.

    python tests/tools/launch_path.py FOLDER      FOLDER/libcuda.so.1: fake_driver.c, compiled

The tensors lie on the CPU, and no kernel runs. All else is Triton's: arguments are bound and specialised, kernels are
compiled for sm_90, loaded and launched, by the calls of the public functions. Prints what happened, as JSON.
"""

import contextlib
import ctypes
import json
import os
import sys
from collections import Counter
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
if __name__ == "__main__":  # not in the processes that compile
    FAKE = ctypes.CDLL(f"{sys.argv[1]}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # so that Triton finds this one loaded
    os.environ["TRITON_LIBCUDA_PATH"] = sys.argv[1]

import torch
import triton
from triton.runtime.jit import JITFunction

from smoothie_kernels import fused_smoothie_step, nearest_token, noise
from smoothie_kernels.backends import triton as backend
from smoothie_kernels.backends.triton import launch, offline, topk

FIELDS = {"offset": [1, 2], "field_weights": [0.6, 0.8]}
V, D = 3000, offline.MUST_FIT[0]


def step(n, *, v=V, d=D, x="bf16", table=None, shift=0, apart=0, needs="", **how):
    """A call, and its backward for what `needs` names: x, e(mbeddings); the loss takes s(moothed), l(se)."""
    rows = torch.zeros(n * d + shift, dtype=offline.TYPES[x])[shift:].view(n, d).requires_grad_("x" in needs)
    embeddings = torch.zeros(v, d + apart, dtype=offline.TYPES[table or x])[:, :d].requires_grad_("e" in needs)
    std = how.pop("std", 0.9)
    made = fused_smoothie_step(rows, embeddings, 0.05, std, seed=1, backend="triton", **how)
    if needs:
        losses = [made.smoothed.float().sum()] * ("s" in needs) + [made.lse.sum()] * ("l" in needs)
        sum(losses).backward()


def plain_calls():
    """Whose kernels kernels-check has to know; they reach all of them."""
    for x in ("bf16", "fp32"):
        step(64, x=x, needs="xesl")  # chunked
        step(64, x=x, workspace=0)  # streamed, in parts
        step(3, x=x)
    step(64, v=30, workspace=0)  # in one part
    step(64, x="fp16")
    step(64, d=offline.MUST_FIT[1], table="fp32")
    for how in ({"std": 0.0}, {"row_ids": torch.arange(64)}, FIELDS):
        step(64, needs="xl", **how)
    step(64, topk=16, smooth="topk", **FIELDS)
    step(64, topk=16, smooth="topk", recall_target=0.9)
    nearest_token(*(torch.zeros(n, D, dtype=torch.bfloat16) for n in (64, V)), backend="triton")
    for ids in (None, torch.arange(5)):
        noise.gaussian(5, 100, seed=1, row_ids=ids, backend="triton")


def odd_calls():
    """Unaligned, ragged, wide, narrow, empty: these only have to launch."""
    step(37, x="fp32", d=37, needs="xesl")
    step(37, shift=1, apart=1, topk=7, **FIELDS)
    step(33, d=1, v=1)
    step(64, apart=8, row_offset=2**32 - 64, workspace=2**20)
    step(0, needs="xesl")
    noise.gaussian(33, 2**17 + 1, seed=1, row_offset=2**31, backend="triton")


class Watched:
    """Launches that were asked for, by kernel, and what is wrong with them."""

    def __init__(self):
        self.kernels, self.problems, self.inside = Counter(), [], 0
        self.run = JITFunction.run

    @contextlib.contextmanager
    def device_of(self, x):
        self.inside += 1
        yield
        self.inside -= 1

    def launch(self, function, *args, grid, warmup, **kwargs):
        name = function.__name__
        self.kernels[name] += 1
        if not self.inside:
            self.problems.append(f"{name}: outside device_of")
        for argument, value in kwargs.items():
            if isinstance(value, torch.Tensor) and not value.numel():
                self.problems.append(f"{name}: {argument} is empty")
        try:
            return self.run(function, *args, grid=grid, warmup=warmup, **kwargs)
        except RuntimeError as error:
            self.problems.append(f"{name}: grid {grid}: {error}")


def driver():
    """Triton's for NVIDIA, without what it asks torch."""
    made = triton.backends.backends["nvidia"].driver()
    made.get_current_device = made.get_current_stream = lambda *_: 0
    made.get_device_capability = lambda device: (9, 0)
    return made


def compile_only(kernel):
    """Into Triton's cache, where the launches find it."""
    offline.compiled(kernel)


def main():
    watched = Watched()
    with (
        mock.patch.object(backend, "supports", return_value=None),
        mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),  # nothing is written: outputs are 0
        mock.patch.object(torch.cuda, "device_of", watched.device_of),
        mock.patch.object(
            JITFunction, "run", lambda function, *args, **kwargs: watched.launch(function, *args, **kwargs)
        ),
    ):
        known = {kernel.key for kernel in offline.recorded("sm_90")}
        triton.runtime.driver.set_active(driver())
        wanted = {}
        for calls in (plain_calls, odd_calls):
            with offline.recording("sm_90") as found:
                calls()
            wanted[calls] = found
        list(offline.in_processes(compile_only, list((wanted[plain_calls] | wanted[odd_calls]).values())))

        watched.kernels.clear(), watched.problems.clear()
        with offline.recording("sm_90", stop=False):
            plain_calls(), odd_calls()
        asked, problems = dict(watched.kernels), list(watched.problems)
        reached, refused = FAKE.fake_launches(), FAKE.fake_refused()

        # What must be found: no device_of, an empty tensor, a grid that is too high.
        topk._average_kernel[1, 2**16](
            weight_ptr=torch.zeros(0), tokens_ptr=torch.zeros(1, 1, dtype=torch.int64), e_ptr=torch.zeros(8, 8),
            smoothed_ptr=torch.zeros(1, 8), K=1, stride_ev=8, D=8, BLOCK_K=16, BLOCK_D=16, **launch.OPTIONS,
        )  # fmt: skip
    unknown = [kernel.label for key, kernel in wanted[plain_calls].items() if key not in known]
    found = {"asked": asked, "reached": reached, "refused": refused, "problems": problems, "unknown": unknown}
    print(json.dumps(found | {"planted": watched.problems[len(problems) :]}))


if __name__ == "__main__":
    main()
