"""What a run needs of the process that it is in: checked before any text is read."""

from __future__ import annotations

import os

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from smoothie_kernels.diffusion.options import RunOptions

# Variables with which accelerate would change a run behind its options, and the values that change nothing.
NEUTRAL = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
}


def check_surroundings(run: RunOptions, processes: int) -> None:
    """Raises ValueError: a variable that would change the run; a tracker that is not here; a batch not to be shared."""
    for name, neutral in NEUTRAL.items():
        value = os.environ.get(name, "").lower()
        if value not in ("", neutral):
            raise ValueError(f"environment variable {name} must not be set: options alone make a run, got {value!r}")
    here = [str(tracker) for tracker in get_available_trackers()]
    if run.report_to not in (None, "all", *here):
        known = run.report_to in LOGGER_TYPE_TO_CLASS
        missing = "it is not installed" if known else f"known are {', '.join(LOGGER_TYPE_TO_CLASS)}"
        installed = ", ".join(here) or "none is"
        raise ValueError(f"report_to must be an installed tracker ({installed}), got {run.report_to!r}: {missing}")
    if run.batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {run.batch_size}")
