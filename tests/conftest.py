import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on CPU tensors

from smoothie_kernels import dispatch
from smoothie_kernels.backends import cuda, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = os.environ.get("SMOOTHIE_GOLDEN")  # a copy of the folder of known answers: then it must be there
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what a GPU would run in seconds, and what stands in for one takes minutes for."""
    if torch.cuda.is_available():
        return
    for item in items:
        if {"hopper", "hopper_library"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("emulator")
        given = getattr(item, "callspec", None)
        if item.path.name.startswith("test_triton") or (given and "triton" in given.params.values()):
            item.add_marker("interpreter")


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend by name; skipped, with its own reason, where it cannot run. The reference in many small chunks."""
    monkeypatch.setattr(reference, "CHUNK", 65)
    device = device_of(request.param)
    reason = dispatch.load(request.param).supports(device, torch.float32)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def triton_runs() -> None:
    reason = dispatch.load("triton").supports(DEVICE, torch.float32)
    if reason:
        pytest.skip(f"triton: {reason}")


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else DEVICE


@pytest.fixture(scope="session")
def hopper_library() -> tuple[Path, str]:
    """The CUDA kernels, and the device that they run on; on the CPU, in an emulator, where there is no Hopper GPU. Both
    define the same operators: a process has one of them."""
    if not cuda.supports("cuda", None):
        return cuda.LIBRARY, "cuda"
    import compiled

    import setup

    try:
        compiled.BUILD.mkdir(exist_ok=True)
        with FileLock(compiled.BUILD / "emulated-library.lock"):  # other workers build it as well
            return compiled.emulated_library(), "cpu"
    except setup.CannotBuild as reason:
        pytest.skip(f"no Hopper GPU, and the emulator of one cannot be built: {reason}")


@pytest.fixture
def hopper(hopper_library: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of backend "cuda", which runs in this test."""
    library, device = hopper_library
    monkeypatch.setattr(cuda, "LIBRARY", library)
    monkeypatch.setattr(cuda, "DEVICE", device)
    return device


@pytest.fixture
def golden() -> Path:
    folder = Path(GOLDEN) if GOLDEN else SHARED / "golden"
    if not folder.is_dir():
        if GOLDEN:
            pytest.fail(f"SMOOTHIE_GOLDEN names a folder of known answers that is not there: {GOLDEN}")
        pytest.skip("the folder of known answers, ../shared/golden, is not here")
    return folder


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN and the largest integer, so that an output nobody wrote cannot look right."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)  # which commands set for their process


@pytest.fixture
def one_thread():
    """For tensors so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_caches(monkeypatch, tmp_path):
    """Data sets are cached in the test's own folder, and the hub is not asked."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
