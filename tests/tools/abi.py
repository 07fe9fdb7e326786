"""What the libraries ask of their host: only functions of the LibTorch stable ABI as torch 2.10 has them, and the
runtimes of C, C++ and OpenMP. Then one build serves every later torch. The CUDA library brings CUDA's runtime along,
and finds the driver when it runs: it is loaded where there is neither.

PYTHONPATH=. python tests/tools/abi.py LIBRARY...     lists the undefined symbols; exits with 1 where one is neither
"""

import re
import subprocess
import sys
from pathlib import Path

import setup

SHIM = "torch/csrc/stable/c/shim.h"  # includes torch/csrc/inductor/aoti_torch/c/shim.h
# Runtimes version their symbols, torch does not. The weak ones belong to the compiler's start-up code.
RUNTIME = re.compile(r".+@+(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP|VERSION)(_|$).*|_ITM_\w+|__gmon_start__|__cxa_finalize")


def undefined_symbols(library: Path) -> list[str]:
    lines = _output(["nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)]).splitlines()
    return sorted(line.split()[-1] for line in lines)


def stable_functions(torch: Path, target: str = setup.TORCH_TARGET) -> set[str]:
    """What the shim headers declare for a library that targets that version of torch."""
    preprocess = [*setup.find_compiler().split(), "-E", "-P", "-x", "c++", "-std=c++17", target, f"-I{torch}/include"]
    text = _output([*preprocess, f"{torch}/include/{SHIM}"])
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def foreign_symbols(symbols: list[str], stable: set[str]) -> list[str]:
    return [symbol for symbol in symbols if symbol not in stable and not RUNTIME.fullmatch(symbol)]


def main(*libraries: str) -> int:
    stable, failed = stable_functions(setup.find_torch(setup.package_folders())), False
    for library in libraries:
        symbols = undefined_symbols(Path(library))
        foreign = foreign_symbols(symbols, stable)
        for symbol in symbols:
            print("FOREIGN" if symbol in foreign else "shim   " if symbol in stable else "runtime", symbol)
        print(f"{library}: {len(symbols)} undefined symbols, {len(foreign)} of them foreign")
        failed |= bool(foreign)
    return int(failed)


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
