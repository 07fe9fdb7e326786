"""The reference trainer's parts, made of the package's public functions."""

from smoothie_kernels.diffusion.noising import noise_tokens
from smoothie_kernels.diffusion.schedules import SCHEDULES, Arctan, Schedule, make_schedule

__all__ = ["SCHEDULES", "Arctan", "Schedule", "make_schedule", "noise_tokens"]
