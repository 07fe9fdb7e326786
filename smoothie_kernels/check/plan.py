"""Which probes a backend has, from the simplest up: a later one may be wrong because an earlier one is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from smoothie_kernels.check import cuda_kernels, probes
from smoothie_kernels.check.probes import NAMES, Probe, Target

CLUSTERS, RESIDENT = (1, 2, 4), (0, 8)
USUAL_PLANS = ((1, 8), (2, 8))  # of backends/cuda.py
WORKSPACES = (0, 2**18)  # none, and one that takes several blocks
MOST_ON_A_CPU = 2**24  # N V D of a case: float64's distances take a second for 2**30
Shape = tuple[int, int, int]


def probes_of(on: Target, quick: bool) -> list[Probe]:
    if quick:
        on = replace(on, dtypes=on.dtypes[:1])
    found = [*_simple(on), *(_cuda_kernels(on) if on.backend == "cuda" else ()), *_step(on)]
    if on.size != "tiny" and on.backend != "reference":
        found += _real(on)
    if on.size == "gpu":
        found += _streams(on)
    return [probe for probe in found if probe.quick or not quick]


def _each_type(
    on: Target, name: str, function: Callable[..., None], *, quick: bool = False, as_used: bool = False, **how: Any
) -> Iterator[Probe]:
    """For kernels of a GPU a probe for every type: Triton compiles for each, and processes do so side by side."""
    if on.size == "gpu" and on.backend != "reference":
        for dtype in on.dtypes:
            yield _probe(on, f"{name}, {NAMES[dtype]}", function, quick, as_used, dtype=dtype, **how)
    else:
        of_types = partial(probes.of_types, function=function)
        yield _probe(on, name, of_types, quick, as_used, dtypes=on.dtypes, **how)


def _probe(
    on: Target, name: str, function: Callable[..., None], quick: bool = False, as_used: bool = False, **how: Any
) -> Probe:
    # On a GPU a kernel of ours is done in milliseconds; Triton's compiler takes a second for each.
    seconds = 180.0 if on.size == "tiny" else 20.0 if on.backend == "cuda" else 60.0
    return Probe(name, on, function, how, quick, as_used, seconds)


def _shapes(on: Target, usual: Sequence[Shape], tiny: Sequence[Shape]) -> list[Shape]:
    """N, V, D, with widths that the backend takes."""
    if on.size == "tiny":
        usual = tiny
    elif on.size == "cpu":
        usual = [shape for shape in usual if shape[0] * shape[1] * shape[2] <= MOST_ON_A_CPU]
    return list(dict.fromkeys((n, v, on.width(d)) for n, v, d in usual))


def _simple(on: Target) -> Iterator[Probe]:
    fields = [(1, 1), (3, 31), (32, 512)] + ([(1000, 257), (64, 4096)] if on.size == "gpu" else [])
    yield _probe(on, "noise field", probes.noise_field, quick=True, shapes=fields)
    tables = [(1, 1), (5, 3), (130, 37)] + ([] if on.size == "tiny" else [(1030, 37), (600, 768), (70, 1024)])
    yield from _each_type(on, "column bias", probes.column_bias, quick=True, shapes=tables)
    if on.backend == "cuda":
        shapes = [(1, 1, 8), (70, 1, 768)]
        yield from _each_type(on, "prepare", cuda_kernels.prepare, quick=True, shapes=shapes)


def _cuda_kernels(on: Target) -> Iterator[Probe]:
    """csrc/cuda/launchers.h, one by one."""
    tiny = [(1, 1, 8), (130, 129, 72), (70, 140, 768)]
    ragged = [(1, 1, 8), (64, 128, 64), (128, 128, 64), (130, 129, 72), (200, 300, 768), (130, 200, 1024)]
    products, modes = _shapes(on, [*ragged, (1100, 515, 320)], tiny), _shapes(on, ragged, tiny)
    for cluster, resident in product(CLUSTERS, RESIDENT):
        how: dict[str, Any] = dict(cluster=cluster, resident=resident)
        name = f"raw products, cluster {cluster}, {resident} resident TMA tiles"
        yield _probe(on, name, cuda_kernels.raw_products, (cluster, resident) in USUAL_PLANS, shapes=products, **how)
    for cluster, resident in product(CLUSTERS, RESIDENT):
        how = dict(cluster=cluster, resident=resident)
        name = f"modes of score, cluster {cluster}, {resident} resident TMA tiles"
        yield _probe(on, name, cuda_kernels.modes, (cluster, resident) == (2, 8), shapes=modes, **how)
    for d in (8, 64, 768, 1024):
        shapes = _shapes(on, [*product((1, 32, 33), (1, 64, 65, 300), (d,))], [(1, 1, d), (33, 140, d)])
        name = f"stream, D = {d}"
        yield _probe(on, name, cuda_kernels.gathered, d == 768, kernel="stream", shapes=shapes)
    for cluster, d in product(CLUSTERS, (8, 64, 128, 256)):
        shapes = _shapes(on, [*product((1, 65, 300), (1, 64, 65, 300), (d,))], [(1, 1, d), (130, 140, d)])
        name = f"narrow, cluster {cluster}, D = {d}"
        how = dict(kernel="narrow", cluster=cluster)
        yield _probe(on, name, cuda_kernels.gathered, (cluster, d) == (2, 64), shapes=shapes, **how)


def _step(on: Target) -> Iterator[Probe]:
    each = partial(_each_type, on)
    some = _shapes(on, [(1, 1, 8), (7, 131, 37), (33, 300, 64), (130, 515, 384)], [(1, 1, 8), (7, 131, 37)])
    yield from each("integers, tokens and means", probes.integer_tokens, quick=True, shapes=some)
    yield from each("integers, top-k", probes.integer_topk, shapes=some, k=9)

    few = [*product((1, 32, 33), (1, 64, 65, 300))]
    for d, quick in ((8, False), (64, True), (768, True), (1024, False)):
        shapes = _shapes(on, [(n, v, d) for n, v in few], [(1, 1, d), (33, 65, d)])
        if on.size != "tiny" or d <= 64:
            yield from each(f"few rows, D = {d}", probes.step, quick=quick, shapes=shapes)
    narrow = _shapes(on, [*product((65, 300), (300,), (8, 64, 128, 256))], [(65, 140, 24)])
    yield from each("many rows, narrow", probes.step, quick=True, shapes=narrow)
    wide = _shapes(on, [(65, 300, 768), (300, 1030, 320), (130, 515, 1024)], [(65, 140, 264)])
    yield from each("many rows, wide", probes.step, quick=True, shapes=wide)
    for workspace in () if on.size == "cpu" else WORKSPACES:
        yield from each(f"many rows, workspace {workspace}", probes.step, shapes=wide[:2], workspace=workspace)

    usual = _shapes(on, [(33, 301, 48), (150, 515, 384)], [(19, 140, 24)])
    yield from each("statistics", probes.statistics, shapes=usual)
    near = _shapes(on, [(1, 1, 8), (1, 257, 24), (33, 300, 64), (300, 700, 1000)], [(1, 1, 8), (33, 140, 24)])
    yield from each("nearest", probes.nearest, quick=True, shapes=near)
    topk = _shapes(on, [(9, 150, 24), (70, 2100, 64), (150, 515, 384)], [(9, 150, 24), (5, 1100, 8)])
    yield from each("top-k, exact", probes.step, quick=True, shapes=topk, topk=9)
    large = _shapes(on, [(100, 5000, 32), (200, 5000, 384)], [(20, 2000, 16)])
    yield from each("top-k, approximate", probes.step, shapes=large, topk=48, recall_target=0.9, recall=0.85)
    if on.gradients:
        yield from each("means of the top-k", probes.means_of_largest, shapes=topk[:2], k=7)
        shapes = _shapes(on, [(19, 261, 40), (70, 515, 384)], [(7, 131, 37)])
        yield from each("gradients", probes.gradients, quick=True, shapes=shapes)
        alike: dict[str, Any] = {"shapes": shapes[:1], "levels": ("usual",), "common": 30.0}
        yield from each("gradients beside a common mean", probes.gradients, **alike)

    # float16 has a way of its own to a mean, which the probes above take; what follows, it has in common with bfloat16.
    others = replace(on, dtypes=on.dtypes[:2]) if on.backend == "triton" else on
    each = partial(_each_type, others)
    yield from each("far rows", probes.step, shapes=usual, far=30.0, levels=("usual", "peaked"), topk=5)
    yield from each("far from the origin", probes.step, shapes=usual[:1], scales=(1e2, 1e3), levels=("peaked",))
    yield from each("peaked, flat, no noise", probes.step, shapes=usual, levels=("peaked", "flat", "no noise"))
    yield from each("sums of fields", probes.sums_of_fields, shapes=usual)
    yield from each("mu, std, row ids of every row", probes.row_values, shapes=usual)
    if on.backend != "cuda":
        odd = _shapes(on, [(9, 130, 1), (18, 127, 3), (7, 131, 37), (300, 140, 333)], [(9, 130, 1), (7, 131, 3)])
        yield from each("odd widths", probes.step, shapes=odd, topk=5)
        yield _probe(on, "rows and table of two types", probes.mixed_types, shapes=usual)
    yield from each("strides", probes.strides, shapes=usual[:1])
    yield from each("same bits", probes.same_bits, shapes=usual, times=2 if on.size == "tiny" else 5)
    if on.backend == "cpu":
        yield from each("threads", probes.threads, shapes=usual[:1])


def _real(on: Target) -> Iterator[Probe]:
    """The paper's width, with a vocabulary of BERT's size."""
    if on.size == "cpu":
        how: dict[str, Any] = {"dtype": on.dtypes[0], "shapes": [(130, 28_996, 768)], "checked": 16, "topk": 9}
        yield _probe(on, "a real shape", probes.real_shape, as_used=True, **how)
        return
    shapes, quick = [(4226, 28_996, 768)], on.backend == "cuda"
    how = {"shapes": shapes, "checked": 64, "as_used": True}
    yield from _each_type(on, "a real shape", probes.real_shape, quick=quick, **how)
    yield from _each_type(on, "a real shape, top-k", probes.real_shape, topk=64, **how)


def _streams(on: Target) -> Iterator[Probe]:
    both = [(20, 5000, 384), (700, 5000, 384)]
    if on.backend != "reference":  # which asks for numbers on the host
        yield from _each_type(on, "a CUDA graph", probes.graph, as_used=True, shapes=both)
    yield from _each_type(on, "a second stream", probes.side_stream, as_used=True, shapes=both)
