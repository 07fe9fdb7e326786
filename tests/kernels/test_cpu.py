"""What is particular to the compiled CPU backend: its tiers, its threads, its memory."""

import ctypes
import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from smoothie_kernels import Vocabulary, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.backends import cpu
from smoothie_kernels.testing import check_gradients, check_step, relative_error

pytestmark = pytest.mark.skipif(
    cpu.supports("cpu", torch.float32) is not None, reason=f"cpu: {cpu.supports('cpu', torch.float32)}"
)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def tier(request, monkeypatch):
    if request.param not in cpu.tiers():
        pytest.skip(f"this processor does not run {request.param}")
    monkeypatch.setenv(cpu.TIER_VARIABLE, request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(1, 300, 40), (9, 257, 33), (35, 140, 24), (70, 390, 16)])
def test_every_tier(tier, n, v, d, dtype):
    table = torch.randn(v, d).to(dtype)
    x = (table[torch.randint(v, (n,))] + 0.3 * torch.randn(n, d)).to(dtype)
    eps, rows = noise.gaussian(n, v, seed=2, backend="reference"), torch.ones(n)
    step = fused_smoothie_step(x, table, 0.1, 0.9, seed=2, backend="cpu")
    assert check_step(step, x, table, 0.1 * rows, 0.9 * rows, eps) == []
    assert (noise.gaussian(n, v, seed=2, backend="cpu") - eps).abs().max() <= 5e-5
    assert torch.equal(nearest_token(x, table, backend="cpu").tokens, step.tokens)
    inputs = x.detach().requires_grad_(), table.detach().requires_grad_()
    step = fused_smoothie_step(*inputs, 0.1, 0.9, seed=2, backend="cpu")
    incoming = torch.randn(n, d).to(dtype), torch.randn(n)
    grads = torch.autograd.grad((step.smoothed, step.lse), inputs, incoming)
    assert check_gradients(grads, x, table, 0.1 * rows, 0.9 * rows, eps, *incoming) == []


def test_one_token_with_all_the_weight_in_every_tier(tier):
    """Rows in panels of two vectors, of one, and several lanes to a row, on three threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for n in (1, 9, 35):
            table = (1000 * torch.randn(300, 41)).requires_grad_()
            x, rows, grad = table.detach()[:n] + 300 * torch.randn(n, 41), torch.ones(n), torch.randn(n, 41)
            step = fused_smoothie_step(x, table, 0.3, 0.9, seed=2, backend="cpu")
            grads = [None, *torch.autograd.grad(step.smoothed, table, grad)]
            eps = noise.gaussian(n, 300, seed=2, backend="reference")
            given = x, table.detach(), 0.3 * rows, 0.9 * rows, eps
            assert check_gradients(grads, *given, grad, torch.zeros(n)) == []
    finally:
        torch.set_num_threads(threads)


def test_sum_of_fields_in_every_tier(tier):
    where, rows = {"seed": 2, "offset": [1, 2**40, 1], "field_weights": [0.7, -0.4, 0.3]}, torch.ones(35)
    table = torch.randn(300, 24)
    x = table[:35] + 0.3 * torch.randn(35, 24)
    eps = noise.gaussian(35, 300, **where, backend="reference")
    inputs = x.requires_grad_(), table.requires_grad_()
    step = fused_smoothie_step(*inputs, 0.1, 0.9, **where, backend="cpu")
    incoming = torch.randn(35, 24), torch.randn(35)
    grads = torch.autograd.grad((step.smoothed, step.lse), inputs, incoming)
    x, table = (t.detach() for t in inputs)
    step = step._replace(smoothed=step.smoothed.detach(), lse=step.lse.detach())
    assert check_step(step, x, table, 0.1 * rows, 0.9 * rows, eps, loudness=1.4) == []
    assert check_gradients(grads, x, table, 0.1 * rows, 0.9 * rows, eps, *incoming, loudness=1.4) == []


def test_16_bit_rounding_is_torch_s(tier):
    """Results of every size, subnormals, overflow and ties among them, rounded to 16 bits as torch rounds."""
    values = torch.cat((torch.randn(500), 10.0 ** torch.linspace(-9, 6, 500), torch.tensor([0.0, 65519.0, 65520.0])))
    values = torch.cat((values, -values))[:, None]
    ties = torch.arange(2048, 2148, dtype=torch.float32)[:, None] / 2**5
    for value in torch.cat((values, ties)):
        # One token: smoothed is its embedding, here in float32, rounded to x's type.
        for dtype in (torch.bfloat16, torch.float16):
            step = fused_smoothie_step(torch.zeros(1, 1, dtype=dtype), value[None], 0.0, 0.0, backend="cpu")
            assert torch.equal(step.smoothed[0], value.to(dtype)), value


STEP = 'fused_smoothie_step(x, vocabulary, 0.05, 0.99, seed=0, backend="cpu")'
TRAIN = f"torch.autograd.grad({STEP}.smoothed, (x, vocabulary.embeddings), torch.ones_like(x))"


def run_and_measure(code: str, call: str = STEP) -> list[float]:
    """Peak memory in MB of a call on the x and vocabulary that `code` makes: beyond them, and of the whole process."""
    program = f"""
import torch
from smoothie_kernels import Vocabulary, fused_smoothie_step
def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
torch.set_num_threads(2)
torch.manual_seed(0)
fused_smoothie_step(torch.randn(300, 8), torch.randn(300, 8), 0.05, 0.99, backend="cpu")
{code}
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
results = {call}
print(resident("VmHWM") - before, resident("VmHWM"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not let a process reset its peak memory")
    assert done.returncode == 0, done.stderr
    return [float(v) for v in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_many_rows():
    extra, _ = run_and_measure("x, vocabulary = torch.randn(4096, 384), Vocabulary(torch.randn(30522, 384))")
    assert extra <= 64


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_large_vocabulary():
    extra, total = run_and_measure("x, vocabulary = torch.randn(64, 768), Vocabulary(torch.randn(256_000, 768))")
    assert extra <= 16
    assert total <= 3500


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("n", [512, 4096])
def test_memory_of_gradients(n):
    """Beyond the gradients of the table, 47 MB, and of x."""
    code = f"x, table = torch.randn({n}, 384, requires_grad=True), torch.randn(30522, 384, requires_grad=True)"
    extra, _ = run_and_measure(f"{code}; vocabulary = Vocabulary(table)", TRAIN)
    assert extra <= 30522 * 384 * 4 / 2**20 + 64


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("n", "v", "d"), [(1, 300, 40), (9, 257, 33), (35, 140, 24), (300, 390, 16), (700, 130, 2000)])
def test_gradients_of_any_number_of_threads(n, v, d, needs):
    """Parts of the vocabulary for every thread, and rows in several goes where they are many and wide."""
    table = torch.randn(v, d)
    x = table[torch.randint(v, (n,))] + 0.3 * torch.randn(n, d)
    grad_smoothed, grad_lse = torch.randn(n, d), torch.randn(n)

    def gradients(backend):
        inputs = x.requires_grad_(needs[0]), table.requires_grad_(needs[1])
        step = fused_smoothie_step(*inputs, 0.1, 0.9, seed=2, backend=backend)
        wanted = [i for i in inputs if i.requires_grad]
        return torch.autograd.grad((step.smoothed, step.lse), wanted, (grad_smoothed, grad_lse))

    expected, before = gradients("reference"), torch.get_num_threads()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        try:
            found = gradients("cpu")
        finally:
            torch.set_num_threads(before)
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) <= 2e-6


def test_both_threads_work_on_one_row(monkeypatch):
    """With one row the vocabulary is shared out: each of two threads uses processor time."""
    if torch.get_num_threads() < 2:
        pytest.skip("torch has one thread")
    vocabulary, x = Vocabulary(torch.randn(60_000, 384)), torch.randn(1, 384)

    def ticks():
        times = {}
        for thread in Path("/proc/self/task").iterdir():
            times[thread.name] = int((thread / "schedstat").read_text().split()[0])
        return times

    if not Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").exists():
        pytest.skip("needs /proc/self/task/*/schedstat")
    fused_smoothie_step(x, vocabulary, 0.05, 0.99)
    before = ticks()
    for _ in range(30):
        fused_smoothie_step(x, vocabulary, 0.05, 0.99)
    spent = sorted((v - before.get(k, 0) for k, v in ticks().items()), reverse=True)
    assert spent[1] >= 0.25 * spent[0]  # half, but for a busy machine: a thread that comes late finds its part taken


def test_denormals_are_zero_inside_and_nowhere_else(tier):
    """Processors crawl over them; gradients of a cross-entropy are full of them."""
    table = torch.randn(300, 24, requires_grad=True)
    x = table.detach()[:40].clone().requires_grad_()
    step = fused_smoothie_step(x, table, 0.1, 0.9, seed=2, backend="cpu")
    grads = torch.autograd.grad(step.smoothed, (x, table), torch.full((40, 24), 1e-40))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    assert (torch.full((1 << 16,), 1e-40) * 0.5 > 0).all()  # on every thread


CALLS = {
    "nearest_token": lambda x, table, _: nearest_token(x, table, backend="cpu"),
    "step": lambda x, table, _: fused_smoothie_step(x, table, 0.1, 0.9, seed=2, backend="cpu"),
    "gradients": lambda x, table, leaf: (
        fused_smoothie_step(leaf, table, 0.1, 0.9, seed=2, backend="cpu").smoothed.sum().backward()
    ),
    "gaussian": lambda *_: noise.gaussian(4, 64, seed=2, backend="cpu"),
    "Vocabulary": lambda x, table, _: Vocabulary(table.embeddings),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_leave_nothing_in_the_heap(name):
    """Not even the 48 bytes of a string: they lie between large temporaries, and the process grows by those."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs mallinfo2 of glibc 2.33")

    class Info(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    libc.mallinfo2.restype = Info
    table, x = Vocabulary(torch.randn(64, 8)), torch.randn(4, 8)
    leaf = x.clone().requires_grad_()

    def used(calls):
        for _ in range(calls):
            CALLS[name](x, table, leaf)
        gc.collect()
        return libc.mallinfo2().field7  # bytes in use

    before = used(100)
    assert used(1000) - before < 16 * 1000
