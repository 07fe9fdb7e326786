"""Backend "cuda" in the emulator, where matrix units keep another number of bits of a sum than Hopper's."""

import pytest
import test_cuda
from cases import inputs
from test_cuda import PATHS, TYPES, step, wrong

take = test_cuda.take  # the fixture


@PATHS
@TYPES
def test_one_bit_less_or_more(hopper, take, monkeypatch, dtype, path):
    """Within the bounds for Hopper's two extra bits; and the setting has an effect."""
    if hopper == "cuda":
        pytest.skip("a GPU's matrix units have one arithmetic")
    take(path)
    x, table = inputs(33, 130, 256, 1.0, hopper, dtype)
    sums = []
    for bits in (1, 3):
        monkeypatch.setenv("SMOOTHIE_EMULATOR_EXTRA_BITS", str(bits))
        found = step(x, table)
        assert wrong(found, x, table) == []
        sums.append(found.lse)
    assert not sums[0].equal(sums[1])
