"""Other numbers in the plans of our GPU backends, timed next to what the backends pick: names, and what to patch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

MIB = 2**20
# (rows, tokens, columns at a time, warps, stages) of chunked.FORWARD and chunked.BACKWARD for 16-bit products
FORWARD_TILES = ((128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3))
BACKWARD_TILES = ((64, 128, 64, 4, 3), (64, 64, 64, 4, 3))


@dataclass(frozen=True)
class Plan:
    backend: str
    changes: Callable[[], Mapping[str, object]] = dict  # attributes of the backend's module: name -> value
    workspace: int = 2**28

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The backend plans so for a while."""
        module = import_module(f"smoothie_kernels.backends.{MODULES[self.backend]}")
        changes = self.changes()
        kept = {name: getattr(module, name) for name in changes}
        try:
            for name, value in changes.items():
                setattr(module, name, value)
            yield
        finally:
            for name, value in kept.items():
                setattr(module, name, value)


MODULES = {"cuda": "cuda", "triton": "triton.chunked"}


def _tile(table: str, numbers: tuple[int, ...]) -> Plan:
    def changes() -> Mapping[str, object]:
        from smoothie_kernels.backends.triton import chunked

        usual = getattr(chunked, table)
        return {table: {family: {**of, 2: chunked.Tile(*numbers)} for family, of in usual.items()}}

    return Plan("triton", changes)


def _set(**changes: Any) -> Plan:
    return Plan("cuda", lambda: changes)


def _most_chunks(count: int) -> Callable[..., int]:
    return lambda row_blocks, tiles, processors, most=2**31: min(count, tiles, most)


CUDA = {
    **{f"resident {count}": _set(RESIDENT=count) for count in (0, 4, 10)},
    **{f"cluster {count}": _set(pick_cluster=lambda row_blocks, count=count: count) for count in (1, 4)},
    **{f"chunks {count}": _set(pick_chunks=_most_chunks(count)) for count in (1, 2, 4)},
    **{f"workspace {mib} MiB": Plan("cuda", workspace=mib * MIB) for mib in (32, 64, 1024)},
}
FEW_ROWS = {"one pass": _set(FEW_ROWS=2**31, NARROWEST=2**31), "two passes": _set(FEW_ROWS=0, NARROWEST=0)}
FORWARD = {"x".join(map(str, tile)): _tile("FORWARD", tile) for tile in FORWARD_TILES}
BACKWARD = {"backward " + "x".join(map(str, tile)): _tile("BACKWARD", tile) for tile in BACKWARD_TILES}
ONE_KERNEL = {"one kernel": Plan("triton", workspace=0)}


def named(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """By the names of their contestants."""
    return {f"fused[{plan.backend}], {name}": plan for name, plan in plans.items()}


ALL = named({**CUDA, **FEW_ROWS, **FORWARD, **BACKWARD, **ONE_KERNEL})
