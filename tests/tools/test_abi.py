"""The library asks torch for nothing but the stable ABI of the oldest torch, and the check would see it if it did."""

import shutil
import subprocess

import abi
import pytest

import setup
from smoothie_kernels.backends import cpu

pytestmark = [
    pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the CPU library is not built"),
    pytest.mark.skipif(not (shutil.which("nm") and shutil.which("c++")), reason="needs nm and a compiler"),
]


@pytest.fixture(scope="module")
def torch_folder():
    return setup.find_torch(setup.package_folders())


def test_library_uses_only_the_stable_abi(torch_folder):
    symbols = abi.undefined_symbols(cpu.LIBRARY)
    assert "torch_parallel_for" in symbols
    assert abi.foreign_symbols(symbols, abi.stable_functions(torch_folder)) == []


def test_functions_newer_than_the_oldest_torch_are_not_stable(torch_folder):
    oldest, newer = (
        abi.stable_functions(torch_folder),
        abi.stable_functions(torch_folder, "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    )
    assert "torch_from_blob" in newer - oldest  # came with 2.11
    assert {"torch_parallel_for", "torch_library_impl", "aoti_torch_get_data_ptr"} <= oldest
    assert oldest < newer


@pytest.mark.parametrize(
    "symbol",
    [
        "_ZN2at4_ops5empty4callEv",
        "_ZN3c104impl8GPUTrace13gpuTraceStateE",
        "_ZNK5torch8autograd4Node4nameEv",
        "_ZNSt6vectorIN2at6TensorESaIS1_EED1Ev",  # unversioned: of torch's build, not of the C++ runtime
        "torch_from_blob",
        "aoti_torch_cuda_mm_out",
        "PyGILState_Ensure",
        "cudaMalloc@libcudart.so.12",
        "sgemm_",
    ],
)
def test_foreign_symbols_are_found(symbol, torch_folder):
    known = [
        "memcpy@GLIBC_2.14",
        "_Znwm@GLIBCXX_3.4",
        "GOMP_parallel@GOMP_4.0",
        "__kmpc_fork_call@VERSION",
        "torch_list_size",
    ]
    assert abi.foreign_symbols([*known, symbol], abi.stable_functions(torch_folder)) == [symbol]


def test_command_fails_on_a_library_with_a_foreign_symbol(tmp_path, capsys):
    source, library = tmp_path / "bad.cpp", tmp_path / "bad.so"
    source.write_text("namespace at { int f(); } int g() { return at::f(); }")
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library], check=True)
    assert abi.main(str(library)) == 1
    assert "FOREIGN _ZN2at1fEv" in capsys.readouterr().out
    assert abi.main(str(cpu.LIBRARY)) == 0
