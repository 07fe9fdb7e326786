"""The processes of a distributed run: how many there are, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

# Where launchers say how many processes they started: torchrun and accelerate, and three kinds of MPI.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
T = TypeVar("T")


def join(cpu: bool) -> PartialState:
    """This process's rank, its device and the number of processes; on the CPU, with gloo, where there is no GPU.

    Raises:
        ValueError: the launcher started several processes, which cannot reach each other: all would do the same work.
    """
    started = max(int(os.environ.get(name) or 1) for name in SIZES)
    state = PartialState(cpu=cpu or (started > 1 and not torch.accelerator.is_available()))
    if state.num_processes != started:
        raise ValueError(
            f"processes must be started by torchrun or accelerate launch, or be on the CPU with cpu = True, got "
            f"{started} of which each would run alone on {state.device}"
        )
    return state


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process. All must ask."""
    if PartialState().num_processes == 1:
        return flag
    flags = torch.tensor([int(flag)], dtype=torch.int64, device="cpu")
    distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=_group())
    return bool(flags.item())


def on_main(function: Callable[[], T]) -> T:
    """What the function returns, or raises, in the main process. All must ask; their errors are the same."""
    state = PartialState()
    if state.num_processes == 1:
        return function()
    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer[0] = function()
        except (OSError, ValueError) as error:
            answer[1] = error
    distributed.broadcast_object_list(answer, src=0, group=_group())
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks, in the main process; nothing in the others."""
    state = PartialState()
    if state.num_processes == 1:
        return [value]
    values: list[Any] | None = [None] * state.num_processes if state.is_main_process else None
    distributed.gather_object(value, values, dst=0, group=_group())
    return values or []


@lru_cache(maxsize=1)
def _group() -> Any:
    """gloo's, over the hosts: no GPU has to wait for an agreement."""
    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
