"""Backend "cuda": rows far away, loud, flat, or not finite; ties; offsets beyond 2**31; gradients; what it refuses."""

import mmap

import pytest
import test_cuda
import torch
from cases import VARIANCE, inputs
from test_cuda import KEY, PATHS, TYPES, same_bits, step, wrong

from smoothie_kernels import Vocabulary, dispatch, library, nearest_token, noise
from smoothie_kernels.backends import cuda, reference, triton
from smoothie_kernels.backends.blocks import column_bias
from smoothie_kernels.stream import Request
from smoothie_kernels.testing import check_gradients

take = test_cuda.take  # the fixture


# --- rows that weights of the first pass do not fit


@pytest.fixture
def done_again(monkeypatch):
    """The rows, by number, that the first pass says it was no good for."""
    found, redo = [], cuda._redo_far

    def spy(given, refs, first, *rest):
        found.append(first.far.nonzero()[:, 0].tolist())
        redo(given, refs, first, *rest)

    monkeypatch.setattr(cuda, "_redo_far", spy)
    return found


FAR = {  # what is done to row i, mu, std
    "far": (lambda row: row + 50, 0.3, 0.9),
    "very far": (lambda row: row + 3000, 0.684, 0.73),
    "repelled": (lambda row: row + 100, -0.1, 0.9),
}


@pytest.mark.parametrize("far", FAR)
@PATHS
@TYPES
def test_rows_done_again(hopper, take, done_again, dtype, path, far):
    """Far rows among near ones: in one group of 32, and in groups that have none, one, or nothing else."""
    take(path)
    moved, mu, std = FAR[far]
    x, table = inputs(130, 300, 72, 1.0, hopper, dtype)
    near = step(x, table, mu, std)
    rows = [3, 40, 41, *range(64, 96), 129]
    x[rows] = moved(x[rows])
    done_again.clear()
    found = step(x, table, mu, std)
    assert done_again == ([] if dtype == torch.float16 else [rows])
    others = [i for i in range(130) if i not in rows]
    for of in (rows, others):
        ids = torch.tensor(of, device=hopper)
        part = type(found)(*(t[ids] for t in found[:4]))
        assert wrong(part, x[ids], table, mu, std, row_ids=ids) == []
    assert same_bits(type(found)(*(t[others] for t in found[:4])), type(found)(*(t[others] for t in near[:4])))


@PATHS
@TYPES
@pytest.mark.parametrize(("mu", "std"), [(0.05, 30.0), (0.05, 1e3), (-0.4, 0.9), (-0.4, 30.0), (0.0, 0.0), (0.0, 1.0)])
def test_loud_repelled_and_flat(hopper, take, dtype, path, mu, std):
    take(path)
    x, table = inputs(70, 300, 40, 1.0, hopper, dtype)
    assert wrong(step(x, table, mu, std), x, table, mu, std) == []


@PATHS
@TYPES
def test_loud_and_quiet_rows_together(hopper, take, dtype, path):
    take(path)
    x, table = inputs(70, 300, 40, 1.0, hopper, dtype)
    std = torch.where(torch.arange(70, device=hopper) % 3 == 0, 40.0, 0.5)
    mu = torch.linspace(-0.3, 0.9, 70, device=hopper)
    found = step(x, table, mu, std)
    for part in (std == 40.0, std == 0.5):
        ids = part.nonzero()[:, 0]
        rows = type(found)(*(t[ids] for t in found[:4]))
        assert wrong(rows, x[ids], table, mu[ids], std[ids], row_ids=ids) == []


@PATHS
@TYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_rows_that_are_not_finite_stay_alone(hopper, take, dtype, path, bad):
    take(path)
    if bad == 3e38 and dtype == torch.float16:
        bad = torch.inf
    x, table = inputs(70, 140, 24, 1.0, hopper, dtype)
    expected = step(x, table)
    x[3, 5], x[66, 23] = bad, bad
    found = step(x, table)
    lost = torch.tensor([3, 66], device=hopper)
    assert found.smoothed[lost].isnan().all()
    assert found.lse[lost].isnan().all()
    for tokens in (found.tokens, found.noisy_tokens):
        assert tokens.min() >= 0
        assert tokens.max() < 140
    others = [i for i in range(70) if i not in (3, 66)]
    assert same_bits(type(found)(*(t[others] for t in found[:4])), type(found)(*(t[others] for t in expected[:4])))


@PATHS
@TYPES
def test_near_tokens_far_from_the_origin(hopper, take, dtype, path):
    """Scores of 16,384 and a little, all exact in float32: what they differ by must come through whole."""
    take(path)
    x, table = (torch.randint(-8, 9, (rows, 16), device=hopper) / 8 for rows in (40, 300))
    x[:, 0], table[:, 0] = 2.0**14, 1.0
    x, table = x.to(dtype), table.to(dtype)
    assert wrong(step(x, table, 0.684), x, table, 0.684) == []


@PATHS
@TYPES
@pytest.mark.parametrize("v", [1, 70, 129])
def test_what_lies_beyond_the_last_token_is_never_best(hopper, take, dtype, path, v):
    """Tokens of zeros would be nearest by far: all scores are below zero."""
    take(path)
    x, table = inputs(70, v, 24, 1.0, hopper, dtype)
    table[:, 0], x[:, 0] = 20, -20
    for mu in (0.3, 0.0, -0.3):
        found = step(x, table, mu)
        assert wrong(found, x, table, mu) == []
        assert found.tokens.max() < v
    assert nearest_token(x, table, backend="cuda").tokens.max() < v


# --- ties


@PATHS
@pytest.mark.parametrize("chunks", [1, 2, 1000])
@pytest.mark.parametrize("period", [5, 8, 64, 130])
def test_ties_go_to_the_lowest_token(hopper, take, monkeypatch, period, chunks, path):
    """Every token again at other places of a thread, in other threads, tiles and chunks; without noise."""
    take(path)
    monkeypatch.setattr(cuda, "pick_chunks", lambda row_blocks, tiles, *_: min(tiles, chunks))
    x, table = inputs(70, period, 64, 1.0, hopper, torch.bfloat16)
    nearest = torch.cdist(x.double(), table.double()).argmin(1)
    found = step(x, table.repeat(-(-700 // period), 1)[:700], 0.5, 0.0)
    assert torch.equal(found.tokens, nearest)
    assert torch.equal(found.noisy_tokens, nearest)
    flat = step(x, table.repeat(-(-700 // period), 1)[:700], 0.0, 0.0)
    assert not flat.noisy_tokens.any()
    assert torch.equal(flat.tokens, nearest)


@PATHS
@pytest.mark.parametrize("pair", [(20, 21), (20, 28), (17, 20), (63, 64), (127, 128), (140, 257), (200, 420), (8, 699)])
def test_two_tokens_tie(hopper, take, monkeypatch, pair, path):
    """Of the equal tokens 140 and 257, in two chunks, the higher is in the first."""
    take(path)
    monkeypatch.setattr(cuda, "pick_chunks", lambda row_blocks, tiles, *_: min(tiles, 2))
    x, table = inputs(70, 700, 64, 1.0, hopper, torch.float16)
    table[pair[1]] = table[pair[0]]
    x[:] = table[pair[0]] + 0.05 * torch.randn_like(x)
    found = step(x, table, 0.5, 0.0)
    assert (found.tokens == pair[0]).all()
    assert (found.noisy_tokens == pair[0]).all()
    assert (nearest_token(x, table, backend="cuda").tokens == pair[0]).all()


# --- numbers beyond 2**31


def mapped(dtype, rows, stride, columns):
    """A matrix whose rows lie so far apart. Its memory is mapped, and hardly touched."""
    size = torch.empty(0, dtype=dtype).element_size() * ((rows - 1) * stride + columns)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    except (OSError, ValueError) as reason:
        pytest.skip(f"cannot map {size >> 30} GiB without reserving them: {reason}")
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (stride, 1))


@pytest.fixture
def on_cpu(hopper):
    if hopper != "cpu":
        pytest.skip("memory is mapped on the CPU")


@PATHS
def test_table_beyond_2_31_elements(hopper, on_cpu, take, path):
    take(path)
    table = mapped(torch.bfloat16, 6, 2**29 + 8, 24)
    dense = torch.randn(6, 24).bfloat16()
    table.copy_(dense)
    x = dense + 0.1 * torch.randn_like(dense)
    assert cuda._aligned(table) is table
    assert same_bits(step(x, table, 0.3), step(x, dense, 0.3))
    for found, expected in zip(*(nearest_token(x, t, backend="cuda") for t in (table, dense)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("mode", "dtype"), [(cuda.WEIGHTS, torch.bfloat16), (cuda.KEYS, torch.int64)])
def test_blocks_beyond_2_31_elements(hopper, on_cpu, mode, dtype):
    """Weights and keys of rows that lie 2**28 apart."""
    given = step_inputs(*inputs(20, 100, 24, 1.0, hopper, torch.bfloat16))
    refs, written = cuda._prepare(given), []
    rows = {cuda.WEIGHTS: cuda.whole_tiles(20), cuda.KEYS: 20}[mode]
    for block in (mapped(dtype, rows, 2**28, 128), torch.empty(rows, 128, dtype=dtype)):
        name = {cuda.WEIGHTS: "weights", cuda.KEYS: "keys"}[mode]
        cuda._score(mode, given, refs, slice(0, 100), **{name: block})
        written.append(block[:20, :100])
    assert torch.equal(*written)


def step_inputs(x, table, mu=0.3, std=0.9, **how):
    rows = torch.ones(len(x), device=x.device)
    seed, offsets = torch.tensor(3, device=x.device), torch.tensor([1], device=x.device)
    bias = column_bias(table)
    given = Request(x, table, bias, mu / VARIANCE * rows, std * rows, None, 0, seed, offsets, None, 2**28)
    return given._replace(**how)


def exact_step(given):
    """By the reference, in float64."""
    wide = {name: getattr(given, name).double() for name in ("x", "embeddings", "scale", "std")}
    return reference.step_fwd(given._replace(bias=column_bias(wide["embeddings"]), **wide))


@PATHS
@pytest.mark.parametrize("mean", [True, False])
@TYPES
def test_what_the_backward_takes(hopper, take, dtype, mean, path):
    """best_score and log_sum, of all rows, with the mean and without."""
    take(path)
    x, table = inputs(70, 300, 72, 1.0, hopper, dtype)
    x[::7] += 40
    found = cuda.step_fwd(step_inputs(x, table, mean=mean))
    exact = exact_step(step_inputs(x, table, mean=mean))
    assert (found.smoothed.shape, found.smoothed.dtype) == ((70, 72 * mean), dtype)
    if mean:
        wide = cuda.step_fwd(step_inputs(x, table, wide=True)).smoothed
        assert wide.dtype == torch.float32
        assert torch.equal(wide.to(dtype), found.smoothed)
    assert torch.equal(found.tokens, exact.tokens)
    assert torch.equal(found.noisy_tokens, exact.noisy_tokens)
    rounding = 0.3 / 1.5**2 * 3e-7 * exact.best_score.abs() + 1e-5  # of scores
    for name in ("lse", "best_score", "log_sum"):
        value = getattr(exact, name)
        assert ((getattr(found, name) - value).abs() <= rounding + 1e-6 * value.abs()).all(), name


@TYPES
def test_lse_comes_from_the_table(hopper, dtype):
    """A change of all scores by the same number, as truncation in the matrix units makes it, changes no lse."""
    given = step_inputs(*inputs(20, 300, 72, 1.0, hopper, dtype))
    refs, lse = cuda._prepare(given), []
    parts = cuda._score(cuda.STATISTICS, given, refs, slice(0, 300))
    for change in (0.0, 0.5):
        parts.numbers[0] -= change
        less = refs._replace(ref_score=refs.ref_score - change)
        lse.append(cuda._merge(given, less, parts, None, None).statistics.lse)
    torch.testing.assert_close(*lse, rtol=1e-6, atol=2e-6)


def test_reads_and_writes_stay_inside(hopper):
    """NaN around x and the table reaches no output."""
    for n, v, d in ((1, 1, 8), (1, 17, 40), (33, 129, 72), (130, 130, 200)):
        around = torch.full((v + 2, d + 16), torch.nan, device=hopper).bfloat16()
        table, x_around = around[1:-1, 8 : 8 + d], torch.full((n + 2, d), torch.nan, device=hopper).bfloat16()
        table.copy_(torch.randn(v, d))
        x = x_around[1:-1].copy_(torch.randn(n, d))
        found = step(x, table)
        assert wrong(found, x, table) == []
        assert same_bits(found, step(x.clone(), table.clone()))


# --- gradients are Triton's


@pytest.mark.parametrize("fields", [{}, {"offset": [1, 7], "field_weights": [0.6, -0.8]}], ids=["one field", "two"])
@TYPES
def test_gradients(hopper, dtype, fields):
    if reason := triton.supports(hopper, dtype):
        pytest.skip(f"triton: {reason}")
    x, table = inputs(19, 150, 24, 1.0, hopper, dtype)
    x, table = x.requires_grad_(), table.requires_grad_()
    found = step(x, table, 0.1, **fields)
    incoming = torch.randn_like(found.smoothed), torch.randn_like(found.lse)
    grads = torch.autograd.grad((found.smoothed, found.lse), (x, table), incoming)
    rows = torch.ones(19, device=hopper)
    eps = noise.gaussian(19, 150, **{**KEY, **fields}, backend="reference").to(hopper)
    given = x.detach(), table.detach(), 0.1 * rows, 0.99 * rows, eps
    assert check_gradients(grads, *given, *incoming, loudness=1.4 if fields else 1.0) == []


def test_opcheck(hopper):
    x, table = inputs(6, 40, 8, 1.0, hopper, torch.bfloat16)
    rows, bias = torch.ones(6, device=hopper), Vocabulary(table, backend="cuda").bias
    seed, offsets = torch.tensor(3), torch.tensor([1])
    request = Request(x, table, bias, 0.1 * rows, 0.9 * rows, None, 0, seed, offsets, None, 2**28)
    torch.library.opcheck(library.step_fwd, request._replace(topk=4, wide=True, backend="cuda"))
    torch.library.opcheck(library.nearest_fwd, (x, table, bias, None, "cuda"))
    torch.library.opcheck(library.gaussian, (x.new_empty(6, 0).float(), 11, None, seed, offsets, None, 5, "cuda"))


# --- what it refuses


def test_says_why_it_cannot_run(monkeypatch):
    """Cheap, and without loading anything."""
    types = "it takes bfloat16 and float16"
    assert cuda.supports("cpu", torch.bfloat16) == "it takes CUDA tensors"
    assert cuda.supports("cuda", torch.float32) == cuda.supports("cuda", torch.float64) == types
    monkeypatch.setattr(cuda, "LIBRARY", cuda.LIBRARY.with_name("absent.so"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.supports("cuda", torch.float16) == "torch finds no NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, of=capability: of)
        wanted = "it takes GPUs of compute capability 9.0 (Hopper), this one has {}.{}".format(*capability)
        assert cuda.supports("cuda", torch.bfloat16) == wanted
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert cuda.supports("cuda", torch.bfloat16).startswith("it was not built: install CUDA's compiler, nvcc >= ")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda.supports("cuda", torch.bfloat16) == "torch finds no NVIDIA GPU"


def test_on_the_cpu_it_says_why():
    x = torch.randn(3, 8).bfloat16()
    for call in (lambda: step(x, x), lambda: nearest_token(x, x, backend="cuda")):
        with pytest.raises(RuntimeError, match=r"'cuda' cannot run on cpu tensors of .*: it takes CUDA tensors"):
            call()
    with pytest.raises(RuntimeError, match="'cuda' cannot run on cpu tensors: it takes CUDA tensors"):
        noise.gaussian(3, 5, seed=1, backend="cuda")


def test_auto_never_takes_it(hopper):
    dispatch._that_run.cache_clear()
    x = torch.randn(3, 8, device=hopper).bfloat16()
    assert dispatch.pick_backend("auto", x.device, x.dtype) is not cuda
    assert "cuda" not in dispatch.BACKENDS
    dispatch._that_run.cache_clear()


@pytest.mark.parametrize(
    ("x", "table", "message"),
    [
        ((torch.float32, 16), (torch.float32, 16), "tensors of torch.float32: it takes bfloat16 and float16"),
        ((torch.bfloat16, 16), (torch.float16, 16), "of one type, got torch.bfloat16 and torch.float16: use"),
        ((torch.bfloat16, 12), (torch.bfloat16, 12), "multiples of 8 up to 1,024, got 12: use backend='auto'"),
        ((torch.bfloat16, 1032), (torch.bfloat16, 1032), "multiples of 8 up to 1,024, got 1032: use backend='auto'"),
        ((torch.bfloat16, 16), (torch.float32, 16), "it takes bfloat16 and float16"),
    ],
)
def test_inputs_that_it_does_not_take(hopper, x, table, message):
    x, table = (torch.zeros(3, width, dtype=dtype, device=hopper) for dtype, width in (x, table))
    for call in (lambda: step(x, table), lambda: nearest_token(x, table, backend="cuda")):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 3, "chunks": 3}, "score: chunks <= parts <= tiles of tokens must hold"),
        ({"parts": 1, "chunks": 2}, "score: chunks <= parts <= tiles of tokens must hold"),
        ({"chunks": 0}, "score: chunks <= parts <= tiles of tokens must hold"),
        ({"cluster": 3}, "score: cluster must be 1, 2 or 4"),
        ({"resident": 12}, "score: too many boxes of x are resident"),
        ({"resident": -1}, "score: too many boxes of x are resident"),
        ({"d": 1024, "resident": 11}, "score: too many boxes of x are resident"),
        ({"mode": 7}, "score: there is no such mode"),
        ({"x": 1}, "x must begin at a multiple of 16 bytes"),
        ({"table": 1}, "embeddings must begin at a multiple of 16 bytes"),
    ],
)
def test_launches_that_it_does_not_take(hopper, change, message):
    how = {"mode": cuda.STATISTICS, "parts": 2, "chunks": 2, "resident": 2, "cluster": 1, "d": 64, "x": 0, "table": 0}
    how |= change
    x, table = (
        torch.zeros(n * how["d"] + how[name], device=hopper).bfloat16()[how[name] :].view(n, how["d"])
        for name, n in (("x", 5), ("table", 200))
    )
    row, parts = torch.ones(5, device=hopper), cuda._empty_parts(x, how["chunks"])
    refs = cuda.Refs(torch.zeros(1, 3, dtype=torch.int32, device=hopper), row, row)
    with pytest.raises(RuntimeError, match=message):
        cuda._call(
            "score", x, how["mode"], x, table, torch.ones(200, device=hopper), row, None, None, 0, *refs, 0, 200,
            how["parts"], how["chunks"], how["resident"], how["cluster"], *parts, None, None,
        )  # fmt: skip


def test_a_refused_launch_leaves_nothing_behind(hopper):
    x, table = inputs(5, 100, 24, 1.0, hopper, torch.bfloat16)
    expected = step(x, table)
    refs = cuda._prepare(step_inputs(x, table))
    with pytest.raises(RuntimeError, match="stream: chunks = parts <= tiles of tokens must hold"):
        cuda._stream(step_inputs(x, table), refs, None, 3)
    assert same_bits(step(x, table), expected)
