"""One row per rule: what is wrong with the call, the exception, and its message."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import UninitializedParameter

from smoothie_kernels import Vocabulary, dispatch, expected_recall, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.backends import cpu

X, TABLE = torch.randn(2, 3, 8), torch.randn(20, 8)
INT_ROWS = torch.zeros(2, 3, dtype=torch.int64)

# What offset and field_weights are, and what comes of it; of noise.gaussian too.
FIELD_ERRORS = [
    ({"offset": "7", "field_weights": [1]}, TypeError, "or several: a sequence of ints or a 1-d int64 tensor, got str"),
    ({"offset": [1, 2.0], "field_weights": [1, 1]}, TypeError, "offset must be an int .* or several: .*, got float"),
    (
        {"offset": [1, 2**64], "field_weights": [1, 1]},
        ValueError,
        "offset must fit in 64 bits, got 18446744073709551616",
    ),
    ({"offset": torch.ones(2), "field_weights": [1, 1]}, TypeError, r"got torch.float32 tensor of shape \[2\]"),
    (
        {"offset": torch.ones(2, 1).long(), "field_weights": [1, 1]},
        TypeError,
        r"or several: .*, got torch.int64 tensor of shape \[2, 1\]",
    ),
    ({"offset": torch.ones(2, 1).long()}, TypeError, r"got torch.int64 tensor of shape \[2, 1\]"),
    ({"offset": [], "field_weights": []}, ValueError, "offset must have at least one entry, got none"),
    (
        {"offset": torch.ones(0).long(), "field_weights": []},
        ValueError,
        "offset must have at least one entry, got none",
    ),
    ({"offset": [1]}, ValueError, "field_weights must be given where offset is several, got None for list"),
    ({"offset": torch.ones(1).long()}, ValueError, "where offset is several, got None for torch.int64 tensor"),
    ({"offset": 1, "field_weights": [1.0]}, ValueError, "field_weights must be None where offset is one, got list"),
    ({"field_weights": torch.ones(1)}, ValueError, "must be None where offset is one, got torch.float32 tensor"),
    ({"offset": [1, 2], "field_weights": [1]}, ValueError, "field_weights must have 2 entries as offset has, got 1"),
    ({"offset": [1, 2], "field_weights": 1.0}, TypeError, "must be a sequence of numbers or a 1-d tensor, got float"),
    ({"offset": [1, 2], "field_weights": "12"}, TypeError, "must be a sequence of numbers or a 1-d tensor, got str"),
    ({"offset": b"ab", "field_weights": [1, 1]}, TypeError, "offset must be an int .* or several: .*, got bytes"),
    ({"offset": [1, 2], "field_weights": b"ab"}, TypeError, "must be a sequence of numbers or a 1-d tensor, got bytes"),
    ({"offset": [1], "field_weights": [10**400]}, ValueError, "field_weights must be finite, got a number beyond"),
    ({"offset": [1, 2], "field_weights": [1, "2"]}, TypeError, "field_weights must be numbers, got str"),
    ({"offset": [1, 2], "field_weights": [1, float("nan")]}, ValueError, "field_weights must be finite, got nan"),
    ({"offset": [1, 2], "field_weights": torch.tensor([-1, -float("inf")])}, ValueError, "finite, got -inf"),
    ({"offset": [1, 2], "field_weights": torch.ones(3)}, ValueError, r"must have shape \[2\] as offset has, got \[3\]"),
    ({"offset": [1, 2], "field_weights": torch.ones(2, 1)}, ValueError, r"\[2\] as offset has, got \[2, 1\]"),
    ({"offset": [1, 2], "field_weights": torch.ones(2).long()}, TypeError, "1-d tensor of floats, got torch.int64"),
    ({"offset": [1, 2], "field_weights": torch.ones(2).requires_grad_()}, ValueError, "field_weights must not require"),
    (
        {"offset": [1, 2], "field_weights": torch.ones(2, device="meta")},
        ValueError,
        "on the device of x, cpu, got meta",
    ),
]

# What is changed in fused_smoothie_step(X, TABLE, 0.1, 0.9, seed=0), and what comes of it.
STEP_ERRORS = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": X.int()}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    ({"x": X[..., :7]}, ValueError, r"x must have shape \[..., D\] with D = 8 as in embeddings, got \[2, 3, 7\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[..., D\] with D = 8 as in embeddings, got \[\]"),
    ({"x": X.to("meta")}, ValueError, "x must be on the device of embeddings, cpu, got meta"),
    ({"x": X.double()}, TypeError, "must both be float64 or neither, got torch.float64 and torch.float32"),
    ({"embeddings": None}, TypeError, "embeddings must be a tensor, got NoneType"),
    ({"embeddings": TABLE.long()}, TypeError, "embeddings must be float32.*, got torch.int64"),
    ({"embeddings": TABLE[0]}, ValueError, r"embeddings must have shape \[V, D\], got \[8\]"),
    ({"embeddings": TABLE[:0]}, ValueError, r"embeddings must have at least one row and one column, got \[0, 8\]"),
    ({"embeddings": TABLE[:, :0]}, ValueError, r"embeddings must have at least one row and one column, got \[20, 0\]"),
    ({"embeddings": TABLE[:1].expand(2**31, 8)}, ValueError, r"fewer than 2\*\*31 rows, got 2147483648"),
    ({"mu": "0.1"}, TypeError, "mu must be a number or a tensor, got str"),
    ({"mu": True}, TypeError, "mu must be a number or a tensor, got bool"),
    ({"mu": INT_ROWS.bool()}, TypeError, "mu must be a real number or tensor, got torch.bool tensor"),
    ({"mu": float("nan")}, ValueError, "mu must be finite, got nan"),
    ({"mu": torch.tensor(float("inf"))}, ValueError, r"mu / sigma_min\*\*2 must be finite, got inf"),
    ({"mu": torch.rand(2)}, ValueError, r"mu must broadcast to x.shape\[:-1\] = \[2, 3\], got \[2\]"),
    ({"mu": torch.rand(2, 3, 8)}, ValueError, r"mu must broadcast to x.shape\[:-1\] = \[2, 3\], got \[2, 3, 8\]"),
    ({"mu": torch.rand(3, device="meta")}, ValueError, "mu must be on the device of x, cpu, got meta"),
    ({"mu": torch.rand(3).requires_grad_()}, ValueError, "mu must not require grad: the step has no gradient for it"),
    ({"std": torch.rand(()).requires_grad_()}, ValueError, "std must not require grad"),
    ({"std": -0.5}, ValueError, "std must not be negative, got -0.5"),
    ({"std": torch.tensor([0.5, -1.0, 0.0])}, ValueError, "std must not be negative, got -1.0"),
    ({"std": float("inf")}, ValueError, "std must be finite, got inf"),
    ({"sigma_min": 0.0}, ValueError, "sigma_min must be positive and finite, got 0.0"),
    ({"sigma_min": -1}, ValueError, "sigma_min must be positive and finite, got -1"),
    ({"sigma_min": float("nan")}, ValueError, "sigma_min must be positive and finite, got nan"),
    *(({"sigma_min": value}, ValueError, r"sigma_min must be in \[2\*\*-63, 2\*\*63\]") for value in (1e-20, 1e200)),
    ({"mu": 1e39}, ValueError, r"mu must be finite in torch.float32, got 1e\+39"),
    ({"std": 1e39}, ValueError, r"std must be finite in torch.float32, got 1e\+39"),
    (
        {"offset": [1], "field_weights": [-1e39]},
        ValueError,
        r"field_weights must be finite in torch.float32, got -1e\+39",
    ),
    (
        {"mu": -1e30, "sigma_min": 1e-5},
        ValueError,
        r"mu / sigma_min\*\*2 must be finite in torch.float32, got -1.0",
    ),
    ({"std": 1e9}, ValueError, r"std must be at most 2\*\*24 in float32, got 1e\+09"),
    (
        {"offset": [1, 2], "field_weights": [1e20, -1e20]},
        ValueError,
        r"std times the sum of \|field_weights\| must be at most 2\*\*24 in float32, got 1.8e\+20",
    ),
    (
        {"mu": torch.empty(3, dtype=torch.bits8)},
        TypeError,
        "mu must be a real number or tensor, got torch.bits8 tensor",
    ),
    ({"x": UninitializedParameter()}, TypeError, "x must be a dense tensor, got UninitializedParameter"),
    ({"embeddings": UninitializedParameter()}, TypeError, "embeddings must be a dense tensor, got UninitializedParam"),
    ({"sigma_min": torch.tensor(1.0)}, TypeError, "sigma_min must be a number, got torch.float32 tensor"),
    ({"seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
    ({"seed": 2**64}, ValueError, "seed must fit in 64 bits, got 18446744073709551616"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, TypeError, r"seed must be an int .* tensor of shape \[2\]"),
    ({"offset": torch.tensor(1.0)}, TypeError, "offset must be an int or a 0-d int64 tensor, or several: .*float32"),
    ({"offset": None}, TypeError, "offset must be an int or a 0-d int64 tensor, or several: .*, got NoneType"),
    ({"offset": 2**64}, ValueError, "offset must fit in 64 bits, got 18446744073709551616"),
    *FIELD_ERRORS,
    ({"row_offset": 1.0}, TypeError, "row_offset must be an int, got float"),
    ({"row_offset": -1}, ValueError, r"row_offset must keep row ids in \[0, 2\*\*32\), got -1 with 6 rows"),
    ({"row_offset": 2**32 - 5}, ValueError, r"row_offset must keep row ids in \[0, 2\*\*32\)"),
    ({"row_ids": [0, 1]}, TypeError, "row_ids must be an int64 tensor, got list"),
    ({"row_ids": INT_ROWS.int()}, TypeError, "row_ids must be an int64 tensor, got torch.int32 tensor"),
    ({"row_ids": INT_ROWS[0]}, ValueError, r"row_ids must have the shape of x.shape\[:-1\], \[2, 3\], got \[3\]"),
    ({"row_ids": INT_ROWS.to("meta")}, ValueError, "row_ids must be on the device of x, cpu, got meta"),
    ({"row_ids": INT_ROWS - 1}, ValueError, r"row_ids must be in \[0, 2\*\*32\), got -1"),
    ({"row_ids": INT_ROWS + 2**32}, ValueError, r"row_ids must be in \[0, 2\*\*32\), got 4294967296"),
    ({"row_ids": INT_ROWS, "row_offset": 1}, ValueError, "row_offset must be 0 where row_ids are given, got 1"),
    ({"topk": 0}, ValueError, r"topk must be in \[1, V\] with V = 20, got 0"),
    ({"topk": -1}, ValueError, r"topk must be in \[1, V\] with V = 20, got -1"),
    ({"topk": 21}, ValueError, r"topk must be in \[1, V\] with V = 20, got 21"),
    ({"topk": 2.0}, TypeError, "topk must be an int or None, got float"),
    ({"topk": True}, TypeError, "topk must be an int or None, got bool"),
    ({"recall_target": 0.9}, ValueError, "recall_target must be 1.0 where topk is None, got 0.9"),
    ({"topk": 2, "recall_target": 0}, ValueError, r"recall_target must be in \(0, 1\], got 0"),
    ({"topk": 2, "recall_target": 1.5}, ValueError, r"recall_target must be in \(0, 1\], got 1.5"),
    ({"topk": 2, "recall_target": float("nan")}, ValueError, r"recall_target must be in \(0, 1\], got nan"),
    ({"topk": 2, "recall_target": "all"}, TypeError, "recall_target must be a number, got str"),
    ({"topk": 2, "smooth": "top-k"}, ValueError, "smooth must be one of 'full', 'topk', 'topk\\+mean', got 'top-k'"),
    ({"topk": 2, "smooth": None}, ValueError, "smooth must be one of 'full', 'topk', 'topk\\+mean', got None"),
    ({"smooth": "topk"}, ValueError, "smooth must be 'full' where topk is None, got 'topk'"),
    ({"workspace": -1}, ValueError, "workspace must not be negative, got -1"),
    ({"workspace": 1e8}, TypeError, "workspace must be an int, got float"),
    ({"backend": "gpu"}, ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'"),
    *(
        ({name: value}, ValueError, f"{name} must be finite, got a number beyond float64")
        for name in ("mu", "std", "sigma_min")
        for value in (10**400, -Fraction(10**400))
    ),
    ({"row_offset": np.uint64(2**64 - 1)}, ValueError, r"row_offset must keep row ids in .*, got 18446744073709551615"),
    ({"row_offset": 10**30}, ValueError, "row_offset must fit in 64 bits, got 1000000000000000000000000000000"),
    ({"workspace": 2**63}, ValueError, r"workspace must be below 2\*\*63, got 9223372036854775808"),
    ({"topk": -(10**5000)}, ValueError, "topk must fit in 64 bits, got one of 16610 bits"),
    ({"topk": 2, "smooth": np.array(["full", "topk"])}, ValueError, "smooth must be one of 'full', .*, got array"),
    ({"backend": np.array(["cpu", "auto"])}, ValueError, "backend must be one of 'auto', .*, got array"),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed must be on a CPU or a CUDA device, got meta"),
    ({"offset": torch.tensor(1, device="meta")}, ValueError, "offset must be on a CPU or a CUDA device, got meta"),
    (
        {"offset": torch.tensor([1], device="meta"), "field_weights": [1]},
        ValueError,
        "offset must be on a CPU or a CUDA device, got meta",
    ),
    ({"mu": torch.tensor(0.1, device="meta")}, ValueError, "mu must be on a CPU or a CUDA device, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), STEP_ERRORS, ids=[m[:50] for _, _, m in STEP_ERRORS])
def test_fused_smoothie_step(change, error, message):
    call = {"x": X, "embeddings": TABLE, "mu": 0.1, "std": 0.9, "seed": 0} | change
    with pytest.raises(error, match=message):
        fused_smoothie_step(call.pop("x"), call.pop("embeddings"), call.pop("mu"), call.pop("std"), **call)


@pytest.mark.parametrize(
    ("change", "error", "message"), [row for row in STEP_ERRORS if row[0].keys() <= {"x", "embeddings", "backend"}]
)
def test_nearest_token(change, error, message):
    call = {"x": X, "embeddings": TABLE} | change
    with pytest.raises(error, match=message):
        nearest_token(call.pop("x"), call.pop("embeddings"), **call)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": -1}, ValueError, "rows must not be negative, got -1"),
        ({"cols": 2.5}, TypeError, "cols must be an int, got float"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
        ({"row_offset": 2**32}, ValueError, "row_offset must keep row ids"),
        ({"row_ids": torch.tensor([0, 1])}, ValueError, r"row_ids must have the shape of x.shape\[:-1\], \[3\]"),
        ({"row_ids": torch.tensor([0, 1, -7])}, ValueError, r"row_ids must be in \[0, 2\*\*32\), got -7"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"rows": 10**30}, ValueError, "rows must fit in 64 bits"),
        ({"cols": 2**63}, ValueError, r"cols must be below 2\*\*63"),
        ({"cols": 2**60}, ValueError, "cols must be at most 2,305,843,009,213,693,952 over rows, got rows=3 and cols="),
        ({"device": "nonsense"}, ValueError, "device must be a device that PyTorch knows, got 'nonsense'"),
        ({"device": 1.5}, ValueError, "device must be a device that PyTorch knows, got 1.5"),
        ({"device": "cuda:77"}, ValueError, "device must be on this machine, which has . GPUs, got cuda:77"),
        *FIELD_ERRORS,
    ],
)
def test_gaussian(change, error, message):
    call = {"rows": 3, "cols": 4, "seed": 0} | change
    with pytest.raises(error, match=message):
        noise.gaussian(call.pop("rows"), call.pop("cols"), **call)


def test_vocabulary():
    with pytest.raises(TypeError, match="embeddings must be a tensor, got Vocabulary"):
        Vocabulary(Vocabulary(TABLE))
    with pytest.raises(ValueError, match="backend must be one of"):
        Vocabulary(TABLE, backend="x")
    with pytest.raises(TypeError, match="check_finite must be a bool, got str"):
        Vocabulary(TABLE, check_finite="no")
    with pytest.raises(ValueError, match="device must be a device that PyTorch knows, got 'nonsense'"):
        Vocabulary(TABLE).to("nonsense")


def test_expected_recall():
    with pytest.raises(ValueError, match=r"V must be below 2\*\*31, got 2147483648"):
        expected_recall(2**31, 1, 1, 1)
    with pytest.raises(ValueError, match=r"buckets must fit in 64 bits"):
        expected_recall(10, 1, 10**400, 1)


def test_a_named_backend_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run on cpu tensors of torch.float64: it takes float32"):
        fused_smoothie_step(X.double(), TABLE.double(), 0.1, 0.9, backend="cpu")
    monkeypatch.setattr(cpu, "LIBRARY", cpu.LIBRARY.with_name("absent.so"))
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run .*: it was not built: install a C\+\+ compiler"):
        fused_smoothie_step(X, TABLE, 0.1, 0.9, backend="cpu")


def test_an_unknown_tier_says_which_there_are(monkeypatch):
    if cpu.supports("cpu", torch.float32):
        pytest.skip("the CPU library is not built")
    monkeypatch.setenv(cpu.TIER_VARIABLE, "mmx")
    with pytest.raises(RuntimeError, match=r"SMOOTHIE_KERNELS_CPU_TIER=mmx is not one of the tiers .*: .*scalar"):
        fused_smoothie_step(X, TABLE, 0.1, 0.9, backend="cpu")
    with pytest.raises(RuntimeError, match="SMOOTHIE_KERNELS_CPU_TIER=mmx is not one of the tiers"):
        cpu._tier()  # where "auto" had chosen the backend before


def test_auto_falls_through_and_logs_once(monkeypatch, caplog):
    dispatch._that_run.cache_clear()
    monkeypatch.setattr(cpu, "LIBRARY", cpu.LIBRARY.with_name("absent.so"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with caplog.at_level("INFO", logger="smoothie_kernels"):
        for _ in range(2):
            fused_smoothie_step(X, TABLE, 0.1, 0.9)
    dispatch._that_run.cache_clear()
    assert len(caplog.records) == 1
    assert "'reference' for cpu tensors" in caplog.text
    assert "not 'cpu': it was not built" in caplog.text


def test_an_error_leaves_nothing_behind():
    """After a refused call the next one gives what it always gave."""
    expected = fused_smoothie_step(X, TABLE, 0.1, 0.9, seed=0)
    with pytest.raises(ValueError, match="row_ids must be in"):
        fused_smoothie_step(X, TABLE, 0.1, 0.9, seed=0, row_ids=INT_ROWS - 1)
    again = fused_smoothie_step(X, TABLE, 0.1, 0.9, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(again[:4], expected[:4], strict=True))
