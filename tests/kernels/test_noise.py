"""The noise field: known answers, every backend against float64, and independence of how it is asked for."""

import json

import pytest
import torch
from cases import FIELDS, loudness
from conftest import device_of
from hypothesis import given, settings
from hypothesis import strategies as st

from smoothie_kernels import dispatch, noise

MAX_ERROR, RMS_ERROR = 5e-5, 2e-6  # of float32 normals against float64

# Random123's kat_vectors.
PHILOX2X32 = [
    ((0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
    ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
    ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
]
PHILOX4X32 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def field(backend, rows, cols, **where):
    return noise.gaussian(rows, cols, backend=backend, device=device_of(backend), **where).cpu().double()


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX2X32)
def test_philox2x32_known_answers(counter, key, expected):
    words = noise.philox2x32(torch.tensor(counter[0]), torch.tensor(counter[1]), key)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX4X32)
def test_philox4x32_known_answers(counter, key, expected):
    assert noise.philox4x32(counter, key) == expected


def test_golden_fields(golden, backend):
    for known in json.loads((golden / "noise.json").read_text())["fields"]:
        rows, cols, seed, offset = (known[k] for k in ("rows", "cols", "seed", "offset"))
        ids = torch.arange(known["row_offset"], known["row_offset"] + rows)
        assert noise.noise_key(seed, offset) == (known["key"], known["row_shift"])
        assert noise.words(ids, 0, cols, seed, offset).tolist() == known["words"]
        exact = torch.tensor(known["gaussian"], dtype=torch.float64)
        assert torch.allclose(noise.normals(ids, 0, cols, seed, offset), exact, rtol=0, atol=1e-12)
        allowed = min(rows, 2**32 - known["row_offset"])  # the last field runs over the end of the row ids
        got = field(backend, allowed, cols, seed=seed, offset=offset, row_offset=known["row_offset"])
        assert (got - exact[:allowed]).abs().max() <= MAX_ERROR


def test_close_to_float64(backend):
    rows, cols = (64, 4096) if backend != "triton" else (32, 512)
    got = field(backend, rows, cols, seed=2**64 - 3, offset=2**40 + 1, row_offset=2**32 - rows)
    error = got - noise.normals(torch.arange(2**32 - rows, 2**32), 0, cols, 2**64 - 3, 2**40 + 1)
    assert error.abs().max() <= MAX_ERROR
    assert error.square().mean().sqrt() <= RMS_ERROR
    assert got.abs().max() <= noise.MAX_ABS_NORMAL


def test_uniform_next_to_one(backend):
    """The row whose r0 is nearest to 2**32 among four million: a float32 uniform would round to 1, the radius to 0."""
    words = noise.words(torch.arange(1 << 22), 0, 1, 11, 0)[:, 0]
    ids = words.argmax()[None]
    assert words.max() > 2**32 - 2**12
    exact = noise.normals(ids, 0, 2, 11, 0)
    assert 0 < exact.abs().max() < 2e-3
    got = field(backend, 1, 2, seed=11, row_ids=ids.to(device_of(backend)))
    assert (got - exact).abs().max() <= 1e-6


def test_moments_and_correlations():
    """A million normals: mean, variance, skew, kurtosis, and products of neighbours, each within 5 standard errors."""
    z = noise.gaussian(256, 4096, seed=5).double()
    n = z.numel()
    for value, expected, variance in (
        (z.mean(), 0, 1),
        (z.square().mean(), 1, 2),
        (z.pow(3).mean(), 0, 15),
        (z.pow(4).mean(), 3, 96),
        ((z[:, 0::2] * z[:, 1::2]).mean(), 0, 2),
        ((z[:, :-2] * z[:, 2:]).mean(), 0, 1),
        ((z[:-1] * z[1:]).mean(), 0, 1),
        ((z * noise.gaussian(256, 4096, seed=5, offset=1)).mean(), 0, 1),
        ((z * noise.gaussian(256, 4096, seed=6)).mean(), 0, 1),
    ):
        assert abs(float(value) - expected) <= 5 * (variance / n) ** 0.5
    histogram = torch.histc((0.5 * (1 + torch.erf(z / 2**0.5))), bins=100, min=0, max=1)
    chi_square = float(((histogram - n / 100) ** 2 / (n / 100)).sum())
    assert chi_square < 99 + 5 * (2 * 99) ** 0.5


SIZES = st.integers(1, 40)


@settings(max_examples=25, deadline=None)
@given(rows=SIZES, cols=SIZES, seed=st.integers(-(2**63), 2**64 - 1), offset=st.integers(0, 2**64 - 1), data=st.data())
def test_any_part_is_a_part_of_the_whole(rows, cols, seed, offset, data):
    """Rows in any order and any split, columns cut anywhere: the same elements."""
    first_id = data.draw(st.integers(0, 2**32 - 64))
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    some_cols = data.draw(st.integers(1, cols))
    for name in ("reference", "cpu"):
        if dispatch.load(name).supports("cpu", torch.float32):
            continue
        where = {"seed": seed, "offset": offset, "backend": name}
        whole = noise.gaussian(rows, cols, row_offset=first_id, **where)
        assert torch.equal(noise.gaussian(rows, some_cols, row_ids=first_id + order, **where), whole[order, :some_cols])
        half = rows // 2
        assert torch.equal(noise.gaussian(rows - half, cols, row_offset=first_id + half, **where), whole[half:])


def test_seed_and_offset_as_tensors(backend):
    ints = field(backend, 3, 8, seed=2**63 + 5, offset=7)
    tensors = field(backend, 3, 8, seed=torch.tensor(-(2**63) + 5), offset=torch.tensor(7))
    assert torch.equal(ints, tensors)


@pytest.mark.parametrize("fields", FIELDS)
def test_sum_of_fields(backend, fields):
    offsets, weights, _ = FIELDS[fields]
    ids = torch.tensor([0, 2**32 - 1, 77])
    exact = sum(w * noise.normals(ids, 0, 31, -3, offset) for w, offset in zip(weights, offsets, strict=True))
    where = {"seed": -3, "row_ids": ids.to(device_of(backend))}
    found = field(backend, 3, 31, offset=offsets, field_weights=weights, **where)
    error = found - exact
    assert error.abs().max() <= MAX_ERROR * loudness(weights)
    assert error.square().mean().sqrt() <= RMS_ERROR * loudness(weights)
    assert found.abs().max() <= noise.MAX_ABS_NORMAL * loudness(weights)
    words = torch.tensor([o - 2**64 if o >= 2**63 else o for o in offsets])
    weights = torch.tensor(weights).to(device_of(backend))
    assert torch.equal(field(backend, 3, 31, offset=words, field_weights=weights, **where), found)


def test_empty(backend):
    assert field(backend, 0, 5, seed=0).shape == (0, 5)
    assert field(backend, 5, 0, seed=0).shape == (5, 0)
    assert field(backend, 0, 5, seed=0, offset=[1, 2], field_weights=[1, 2]).shape == (0, 5)
