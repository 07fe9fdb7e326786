"""Checkpoints that are whole or not there: written in a hidden folder, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from smoothie_kernels.diffusion.files import named, sync
from smoothie_kernels.diffusion.reading import flat

STATE, OPTIONS = "training_state.pt", "training.json"
Resume = bool | Literal["auto"]
_NAME = re.compile(r"checkpoint-(\d+)")


def save(
    output: Path, step: int, write_model: Callable[[Path], None], state: Mapping[str, Any], options: Mapping[str, Any],
    keep: int,
) -> Path:  # fmt: skip
    """`output`/checkpoint-`step`, of which the newest `keep` stay.

    write_model fills a folder with what `from_pretrained` reads. A folder that is called checkpoint-N is whole: its
    files were on the disk before it got that name, and it loses the name before it is removed.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    folder = output / f"checkpoint-{step}"
    partial = output / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with named(partial):
            partial.mkdir(parents=True)
            write_model(partial)
            torch.save(dict(state), partial / STATE)
            (partial / OPTIONS).write_text(json.dumps(dict(options), indent=2) + "\n")
            for path in (*partial.rglob("*"), partial):
                sync(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError | SafetensorError):  # a full disk, in torch's words and in safetensors'
            raise OSError(f"{folder} cannot be written: {error}") from error
        raise
    os.replace(partial, folder)
    sync(output)
    for old in found(output)[:-keep]:
        os.replace(old, partial)  # so that no crash leaves a part of it under its name
        shutil.rmtree(partial)
    return folder


def clean(output: Path) -> None:
    """Removes what interrupted runs left half written, or half removed."""
    for partial in output.glob(".partial-*"):
        shutil.rmtree(partial)


def found(output: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    steps = {int(match[1]): path for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def newest(output: Path) -> Path:
    """The checkpoint to go on from."""
    checkpoints = found(output)
    if not checkpoints:
        raise ValueError(f"output must hold a checkpoint to resume from, got {output} without any")
    return checkpoints[-1]


def start(output: Path, resume: Resume, steps: int) -> Path | None:
    """The checkpoint from which a run up to `steps` goes on; None to begin at step 0.

    resume: True asks for a checkpoint, False for none, "auto" takes what is there.

    Raises:
        ValueError: there is a checkpoint, or none, or one of a later step.
    """
    there = found(output)
    if not there and resume is not True:
        return None
    last = newest(output)
    if not resume:
        raise ValueError(f"output must hold no checkpoint, or resume must be given, got {last}")
    if steps < (done := _step(last)):
        raise ValueError(f"steps must be at least {done}, which {last} has done already, got {steps}")
    return last


def load_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return _state(checkpoint)
    except _DAMAGE as error:
        raise _unreadable(checkpoint, STATE, error) from error


def check_options(checkpoint: Path, options: Mapping[str, Any], free: set[str]) -> None:
    """Refuses to go on with another run than the checkpoint's; names in `free` may differ."""
    try:
        before = _options(checkpoint)
    except _DAMAGE as error:
        raise _unreadable(checkpoint, OPTIONS, error) from error
    if other := differences(before, options, free):
        raise ValueError(f"options must be those of {checkpoint} to resume it: it has {'; '.join(other)}")


def differences(before: Mapping[str, Any], options: Mapping[str, Any], free: set[str]) -> list[str]:
    """What is not as it was, in words."""
    was, now = (
        dict(flat({name: value for name, value in each.items() if name not in free}))
        for each in (before, json.loads(json.dumps(dict(options))))
    )
    return [
        f"{name} = {json.dumps(was.get(name))}, got {json.dumps(now.get(name))}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]


# What reading a file that is missing, empty, cut off or of another kind raises.
_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, TypeError, UnpicklingError)


def _state(checkpoint: Path) -> dict[str, Any]:
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"it holds no training state but {type(state).__name__}")
    return state


def _options(checkpoint: Path) -> dict[str, Any]:
    options = json.loads((checkpoint / OPTIONS).read_text())
    if not isinstance(options, dict):
        raise ValueError(f"it holds no options but {type(options).__name__}")
    return options


def _unreadable(checkpoint: Path, name: str, error: BaseException) -> ValueError:
    """Names the file, and the older checkpoint that is whole."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    advice = "there is no older one that can be read"
    for older in reversed(found(checkpoint.parent)):
        if _step(older) < _step(checkpoint) and _is_whole(older):
            advice = f"remove {checkpoint} to resume from {older}, which can be read"
            break
    return ValueError(f"checkpoint must have a {name} that can be read, got {checkpoint / name}: {reason}; {advice}")


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(_state(checkpoint) and _options(checkpoint))
    except _DAMAGE:
        return False


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
