"""What a case and a contestant of every benchmark have, and which cases a run takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar


@dataclass(frozen=True)
class Contestant:
    """Who runs."""

    name: str
    what: str
    ours: bool = False  # of this package: a wrong result ends the run
    compiles: bool = False  # its first call compiles a program, whose memory is not the step's


@dataclass(frozen=True)
class Case:
    """One set of inputs, and who runs on it. N rows, V vocabulary, D width."""

    name: str
    why: str
    contestants: tuple[str, ...] = ()  # the first one of ours is what the others are compared with
    v: int | None = None  # None: the embedding table's
    d: int | None = None  # None: the table's; any other width means a synthetic table
    groups: tuple[str, ...] = ("cpu",)  # "cpu" and "cuda" are the default runs of a device, "cpu full" is for --full
    repeats: int | None = None  # timed runs of every contestant; None: as many as `timing.race` finds


Named = TypeVar("Named", bound=Contestant | Case)


def by_name(*each: Named) -> dict[str, Named]:
    return {one.name: one for one in each}


SomeCase = TypeVar("SomeCase", bound=Case)


def select(
    cases: Mapping[str, SomeCase], device: str, *, full: bool = False, patterns: Iterable[str] = ()
) -> list[SomeCase]:
    """The cases of a device; with patterns all that match any of them. ValueError where a pattern fits none."""
    patterns, groups = list(patterns), {device, f"{device} full"} if full else {device}
    if not patterns:
        return [case for case in cases.values() if groups & {*case.groups}]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in cases):
            raise ValueError(f"no case is named {pattern!r}; there are: {', '.join(cases)}")
    return [case for name, case in cases.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
