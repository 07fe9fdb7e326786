"""Checkpoints that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

STATE, OPTIONS = "training_state.pt", "training.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def save(
    output: Path, step: int, write_model: Callable[[Path], None], state: Mapping[str, Any], options: Mapping[str, Any],
    keep: int,
) -> Path:  # fmt: skip
    """`output`/checkpoint-`step`, of which the newest `keep` stay.

    write_model fills a folder with what `from_pretrained` reads. A folder that is called checkpoint-N is whole: its
    files were on the disk before it got that name.
    """
    place = output / f"checkpoint-{step}"
    partial = output / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_model(partial)
    torch.save(dict(state), partial / STATE)
    (partial / OPTIONS).write_text(json.dumps(dict(options), indent=2) + "\n")
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    _sync(output)
    for old in found(output)[:-keep]:
        shutil.rmtree(old)
    return place


def found(output: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    steps = {int(match[1]): path for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def newest(output: Path) -> Path:
    """The checkpoint to go on from; what an interrupted run left half written is removed."""
    for partial in output.glob(".partial-*"):
        shutil.rmtree(partial)
    checkpoints = found(output)
    if not checkpoints:
        raise ValueError(f"output must hold a checkpoint to resume from, got {output} without any")
    return checkpoints[-1]


def load_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint must hold {STATE} to resume from, got {checkpoint} without it") from None
    return state


def check_options(checkpoint: Path, options: Mapping[str, Any], free: set[str]) -> None:
    """Refuses to go on with another run than the checkpoint's; names in `free` may differ."""
    if other := differences(json.loads((checkpoint / OPTIONS).read_text()), options, free):
        raise ValueError(f"options must be those of {checkpoint} to resume it: it has {'; '.join(other)}")


def differences(before: Mapping[str, Any], options: Mapping[str, Any], free: set[str]) -> list[str]:
    """What is not as it was, in words."""
    now = json.loads(json.dumps(dict(options)))
    return [
        f"{name} = {json.dumps(before.get(name))}, got {json.dumps(now.get(name))}"
        for name in sorted((before.keys() | now.keys()) - free)
        if before.get(name) != now.get(name)
    ]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
