"""The reference trainer and sampler and their parts, made of the package's public functions.

Schedules, noising and `sample` need torch alone. All else needs what `pip install '.[train]'` brings,
and is imported when it is asked for.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from smoothie_kernels.diffusion.noising import noise_tokens, smooth
from smoothie_kernels.diffusion.sampling import Samples, sample
from smoothie_kernels.diffusion.schedules import SCHEDULES, Arctan, Schedule, make_schedule
from smoothie_kernels.diffusion.solvers import SOLVERS

if TYPE_CHECKING:
    from smoothie_kernels.diffusion.embeddings import load_embeddings
    from smoothie_kernels.diffusion.loss import Losses, Place, TrainingLoss
    from smoothie_kernels.diffusion.model import Condition, SmoothieConfig, SmoothieModel
    from smoothie_kernels.diffusion.options import LossOptions, RunOptions, SampleOptions
    from smoothie_kernels.diffusion.pipeline import Generated, SmoothiePipeline
    from smoothie_kernels.diffusion.trainer import Texts, Trainer

_MODULES = {
    "embeddings": ("load_embeddings",),
    "loss": ("Losses", "Place", "TrainingLoss"),
    "model": ("Condition", "SmoothieConfig", "SmoothieModel"),
    "options": ("LossOptions", "RunOptions", "SampleOptions"),
    "pipeline": ("Generated", "SmoothiePipeline"),
    "trainer": ("Texts", "Trainer"),
}

__all__ = [
    "SCHEDULES", "SOLVERS", "Arctan", "Condition", "Generated", "LossOptions", "Losses", "Place", "RunOptions",
    "SampleOptions", "Samples", "Schedule", "SmoothieConfig", "SmoothieModel", "SmoothiePipeline", "Texts",
    "Trainer", "TrainingLoss", "load_embeddings", "make_schedule", "noise_tokens", "sample", "smooth",
]  # fmt: skip


class _Registration(MetaPathFinder):
    """Makes the model known to transformers' auto classes when they are imported, and imports nothing before."""

    AUTO = "transformers.models.auto.modeling_auto"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                import_module(f"{__name__}.model")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _Registration.AUTO in sys.modules:
    import_module(f"{__name__}.model")
else:
    sys.meta_path.insert(0, _Registration())


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
