"""Backend "cuda" on a Hopper GPU: real shapes, streams, graphs, devices. Other tests run in the emulator as well."""

import pytest
import torch
from cases import inputs
from test_cuda import KEY, TYPES, same_bits, wrong

from smoothie_kernels import SmoothieStep, TopK, Vocabulary, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.testing import FLOOR, check_step, check_topk, relative_error


@pytest.fixture(autouse=True)
def on_a_gpu(hopper):
    if hopper != "cuda":
        pytest.skip("needs a Hopper GPU, and the CUDA library")


def step(x, table, mu=0.05, std=0.99, **how):
    return fused_smoothie_step(x, table, mu, std, **{**KEY, **how}, backend="cuda")


def wrong_of_some(found, x, table, mu, std, recall=1.0):
    """Of rows of all blocks, the first and the last among them: the others would not fit in float64."""
    last = len(x) - 1
    rows = torch.cat((torch.randperm(len(x))[:60], torch.tensor([0, 127, 128, last]).clamp_max(last))).to(x.device)
    eps = noise.gaussian(64, len(table), **KEY, row_ids=rows.cpu(), backend="reference").to(x.device)
    ones = torch.ones(64, device=x.device)
    given = x[rows], table, mu * ones, std * ones, eps
    wrong = check_step(SmoothieStep(*(t[rows] for t in found[:4])), *given)
    if found.topk:
        wrong += check_topk(TopK(*(t[rows] for t in found.topk)), *given, recall=recall)
    return wrong


@TYPES
@pytest.mark.parametrize("d", [384, 768, 1024])
@pytest.mark.parametrize(("mu", "std"), [(0.684, 0.73), (0.0244, 1.0), (7e-5, 1.0)])
def test_real_shapes(d, mu, std, dtype):
    x, table = inputs(16_384, 28_996, d, 1.0, "cuda", dtype)
    vocabulary = Vocabulary(table, backend="cuda")
    for how in ({}, {"topk": 64}, {"topk": 64, "recall_target": 0.95}):
        found = step(x, vocabulary, mu, std, **how)
        assert wrong_of_some(found, x, table, mu, std, how.get("recall_target", 1.02) - 0.02) == []
        assert found.smoothed.isfinite().all()
        assert found.lse.isfinite().all()
    assert torch.equal(nearest_token(x, vocabulary, backend="cuda").tokens, found.tokens)


@TYPES
@pytest.mark.parametrize("n", [64, 65, 700, 4096 + 128 + 1])
def test_rows_of_real_tables(n, dtype):
    """The last row of one way and the first of the other; a second block of rows."""
    x, table = inputs(n, 30_522, 768, 1.0, "cuda", dtype)
    assert wrong_of_some(step(x, table), x, table, 0.05, 0.99) == []


@pytest.mark.parametrize("n", [20, 700])
def test_same_bits(n):
    x, table = inputs(n, 28_996, 384, 1.0, "cuda", torch.bfloat16)
    x[::5] += 30  # done again
    expected = step(x, table, topk=64)
    for _ in range(20):
        found = step(x, table, topk=64)
        assert same_bits(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(found.topk, expected.topk, strict=True))


@pytest.mark.parametrize("n", [20, 700])
@pytest.mark.parametrize("topk", [None, 16])
def test_streams(n, topk):
    """x is written late on the stream of the call: on any other, the step would read what was there before."""
    x, table = inputs(n, 5000, 384, 1.0, "cuda", torch.bfloat16)
    vocabulary, late = Vocabulary(table, backend="cuda"), torch.zeros_like(x)
    expected, nearest = step(x, vocabulary, topk=topk), nearest_token(x, vocabulary, backend="cuda")
    field = noise.gaussian(n, 99, seed=1, device="cuda", backend="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        found, also = step(late, vocabulary, topk=topk), nearest_token(late, vocabulary, backend="cuda")
        seed = torch.zeros((), dtype=torch.int64, device="cuda")
        torch.cuda._sleep(50_000_000)
        seed.add_(1)
        of_side = noise.gaussian(n, 99, seed=seed, device="cuda", backend="cuda")
    side.synchronize()
    # On another stream cuBLAS may multiply weights and table in another order.
    assert same_bits(found._replace(smoothed=expected.smoothed), expected)
    assert relative_error(found.smoothed, expected.smoothed) <= FLOOR[x.dtype]
    assert torch.equal(also.tokens, nearest.tokens)
    assert torch.equal(of_side, field)


@pytest.mark.parametrize("n", [20, 700])
def test_graph(n):
    """Replayed with other rows, seeds, offsets and weights of fields.

    Without a recall_target the host asks for rows to do again, but not during capture: other kernels find the largest
    logits, and near-equal ones may come in another order. So these are compared with float64 alone.
    """
    x, table = inputs(n, 5000, 384, 1.0, "cuda", torch.bfloat16)
    vocabulary, seed, offset = Vocabulary(table, backend="cuda"), *torch.tensor([3, 0], device="cuda")
    several, weights = torch.arange(3, device="cuda"), torch.rand(3, device="cuda")

    def results():
        one = step(x, vocabulary, seed=seed, offset=offset, topk=8)
        sums = step(x, vocabulary, seed=seed, offset=several, field_weights=weights)
        few = step(x, vocabulary, seed=seed, offset=offset, topk=8, recall_target=0.9, smooth="topk+mean")
        return one, (*sums[:4], *few[:4], *few.topk, *nearest_token(x, vocabulary, backend="cuda"))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        results()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        of_graph, captured = results()
    for k in (0, 1, 5):
        seed.add_(k)
        offset.fill_(-k)
        several.add_(k)
        weights.mul_(-1.5)
        x.copy_(x.roll(1, 0))
        x[0] += 30 * k  # done again
        graph.replay()
        where = {"seed": int(seed), "offset": int(offset)}
        assert wrong(of_graph, x, table, **where) == []
        ones = torch.ones(n, device="cuda")
        eps = noise.gaussian(n, 5000, **where, backend="reference").to("cuda")
        assert check_topk(of_graph.topk, x, table, 0.05 * ones, 0.99 * ones, eps) == []
        for a, b in zip(captured, results()[1], strict=True):
            if a.dtype == x.dtype:  # cuBLAS may multiply in another order
                assert relative_error(a, b) <= FLOOR[x.dtype]
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_another_device():
    """Kernels go to the device of the tensors, which is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for n in (20, 700):
        x, table = inputs(n, 5000, 384, 1.0, "cuda:0", torch.bfloat16)
        expected = step(x, table, topk=8)
        found = step(x.to("cuda:1"), table.to("cuda:1"), topk=8)
        assert found.smoothed.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        assert same_bits(SmoothieStep(*(t.to("cuda:0") for t in found[:4])), expected)


def test_table_beyond_2_31_elements():
    """Rows of the table 2**28 apart, all in one allocation of 5 GiB."""
    x, dense = inputs(70, 10, 24, 1.0, "cuda", torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    table = torch.empty(9 * 2**28 + 24, dtype=x.dtype, device="cuda").as_strided((10, 24), (2**28, 1))
    table.copy_(dense)
    assert same_bits(step(x, table), step(x, dense))


def test_workspace_holds():
    """Beside inputs and outputs a call takes little more than its workspace."""
    x, table = inputs(8192, 28_996, 384, 1.0, "cuda", torch.bfloat16)
    vocabulary = Vocabulary(table, backend="cuda")
    step(x[:200], vocabulary)  # what libraries take once
    for workspace in (2**26, 2**28):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x, vocabulary, workspace=workspace)
        taken = torch.cuda.max_memory_allocated() - before
        assert taken <= 1.1 * workspace + 3 * x.numel() * x.itemsize
