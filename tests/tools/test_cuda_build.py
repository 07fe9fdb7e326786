"""The CUDA library: what is compiled into it, where it is left out, what it asks of its host; without a GPU.

Where nvcc is not, what needs it is skipped: the rest holds everywhere.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import abi
import pytest
import test_build
from test_build import fake_torch, run

import setup
from smoothie_kernels.backends import cuda

project = test_build.project  # the fixture
LIBRARY = setup.ROOT / "smoothie_kernels" / setup.CUDA_LIBRARY

spec = importlib.util.spec_from_file_location("cuda_check", setup.ROOT / "tests/cuda/check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


def fake_nvcc(folder: Path, version: str = "13.0", script: str = "exit 1") -> Path:
    """Knows its version and its folder; else it does as the script says."""
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
case "$*" in
    *--version*) echo 'Cuda compilation tools, release {version}, V{version}.88';;
    *--dryrun*) echo '#$ TOP={folder}/toolkit/bin/..' >&2;;
    *) {script};;
esac
"""
    )
    nvcc.chmod(0o755)
    (folder / "toolkit" / "lib64").mkdir()
    return nvcc


# --- Finding nvcc


def test_finds_nvcc_where_it_may_be(tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path, "12.5")
    monkeypatch.setenv("NVCC", f"{nvcc} -ccbin g++-13")
    assert setup.find_nvcc() == [str(nvcc), "-ccbin", "g++-13"]
    assert setup.find_toolkit(setup.find_nvcc()) == (tmp_path / "toolkit").resolve()
    monkeypatch.delenv("NVCC")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    assert setup.find_nvcc() == [str(nvcc)]
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(setup.LeftOut, match="no nvcc found"):
        setup.find_nvcc()


@pytest.mark.parametrize("version", ["12.4", "11.8", "unknown"])
def test_says_that_nvcc_is_too_old(tmp_path, monkeypatch, version):
    monkeypatch.setenv("NVCC", str(fake_nvcc(tmp_path, version)))
    number = "?" if version == "unknown" else version
    with pytest.raises(setup.LeftOut, match=rf"nvcc {re.escape(number)} is older than 12\.5"):
        setup.find_nvcc()


# --- What is compiled


def test_each_compiler_has_its_files(tmp_path, monkeypatch):
    monkeypatch.delenv("SMOOTHIE_KERNELS_CUDA", raising=False)
    monkeypatch.setenv("TORCH_DIR", str(fake_torch(tmp_path)))
    monkeypatch.setenv("NVCC", str(fake_nvcc(tmp_path)))
    monkeypatch.setattr(setup, "find_compiler", lambda: "c++")
    rules, *builds = setup.cuda_ninja_file(tmp_path / "out.so").split("\nbuild ")
    plain, nvcc, link = (re.sub(r"\n.*", "", rule) for rule in rules.split("command = ")[1:])
    assert "-gencode=arch=compute_90a,code=sm_90a" in nvcc
    assert "-Xcompiler=-fPIC,-fvisibility=hidden" in nvcc
    assert f"-I{setup.TREE}/csrc/cuda/sm90" in nvcc
    assert "$out.log" in nvcc
    assert "fast-math" not in rules  # infinities are meant
    assert "torch" not in nvcc  # no header of torch: any build of it will do
    assert "toolkit" not in plain  # nor one of CUDA for the file that knows torch
    assert setup.TORCH_TARGET in plain
    assert f"-L{tmp_path}/toolkit/lib64" in link
    assert "-lcudart_static" in link
    assert not re.search(r"-l(cuda|cudart)\b(?!_static)", link)
    compiled = {build.split()[-1 if "flags" not in build else 2]: build.split()[1] for build in builds[:-1]}
    assert {rule for source, rule in compiled.items() if source.endswith(".cu")} == {"compile.cu"}
    assert [source for source in compiled if not source.endswith(".cu")] == [f"{setup.TREE}/csrc/cuda/bindings.cpp"]
    assert {Path(source).name for source in compiled} >= {
        "bindings.cpp",
        "score.cu",
        "narrow.cu",
        "small.cu",
        "stream.cu",
    }


def test_what_a_compiler_says_is_kept_and_shown_when_it_fails(tmp_path, capfd):
    compilers = {
        ending: str(fake_nvcc(tmp_path / ending, script=f"echo said {ending} >&2; {then}"))
        for ending, then in ((".good", "touch one.o"), (".bad", "exit 1"))
    }
    for ending in compilers:
        (tmp_path / f"one{ending}").touch()
    outcomes = {}
    for ending in compilers:
        text = setup.ninja_file("true", [], {str(tmp_path / f"one{ending}"): []}, [], tmp_path / "out", compilers)
        try:
            setup.run_ninja(tmp_path / f"build{ending}", text, ["one.o"])
            outcomes[ending] = "compiled"
        except setup.CannotBuild as reason:
            outcomes[ending] = str(reason)
        assert (tmp_path / f"build{ending}" / "one.o.log").read_text() == f"said {ending}\n"
    assert outcomes == {".good": "compiled", ".bad": "the compiler failed; its messages are above"}
    shown = capfd.readouterr()
    assert shown.out == ""  # that is for what is asked of a command
    assert "said .bad" in shown.err
    assert "said .good" not in shown.err


def test_nvcc_is_given_no_name_of_the_tree(tmp_path, monkeypatch):
    """It hands them to a shell in double quotes."""
    root = tmp_path / "o'n $HOME e"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "one.cu").write_text("__global__ void kernel() {}\n")
    monkeypatch.setattr(setup, "ROOT", root)
    try:
        nvcc = shlex.join(setup.find_nvcc())
    except setup.LeftOut as reason:
        pytest.skip(str(reason))
    text = setup.ninja_file("c++", [], {"csrc/one.cu": []}, [], root / "out", {".cu": f"{nvcc} -I{setup.TREE}/csrc"})
    setup.run_ninja(root / "build", text, ["one.o"])
    assert (root / "build" / "one.o").stat().st_size


# --- Installing without it


def test_switched_off_leaves_the_libraries_of_an_editable_installation(install, project):
    done, libraries = install(SMOOTHIE_KERNELS_BUILD="0", empty=False)
    assert done.returncode == 0, done.stderr
    assert libraries == {setup.CPU_LIBRARY, setup.CUDA_LIBRARY, setup.WATCHDOG_LIBRARY}
    assert "not building the CUDA library: SMOOTHIE_KERNELS_BUILD=0" in done.stderr


@pytest.fixture
def install(project, tmp_path):
    """Builds in a copy whose compilers write empty files; gives the outcome, and the libraries that are there then."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "TORCH_DIR": str(fake_torch(tmp_path)), "SMOOTHIE_KERNELS_CUDA": ""}
    environment["NVCC"] = str(fake_nvcc(tmp_path, script=f'exec {compiler} "$@"'))
    package = project / "smoothie_kernels"

    def build(*, empty=True, **other):
        for library in (setup.CPU_LIBRARY, setup.CUDA_LIBRARY, setup.WATCHDOG_LIBRARY):
            (package / library).write_text("of an earlier build")
        done = run(project, "setup.py", "-q", "build_ext", "--inplace", **{**environment, **other})
        assert all((path.read_text() == "") == empty for path in package.glob("*.so"))
        return done, {path.name for path in package.glob("*.so")}

    return build


def test_both_are_built(install):
    done, libraries = install(SMOOTHIE_KERNELS_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert libraries == {setup.CPU_LIBRARY, setup.CUDA_LIBRARY}


@pytest.mark.parametrize(
    ("asked", "cuda", "built"),
    [
        ("1", "", {setup.CPU_LIBRARY, setup.CUDA_LIBRARY, setup.WATCHDOG_LIBRARY}),
        ("1", "0", {setup.CPU_LIBRARY}),
        ("0", "", {setup.CPU_LIBRARY, setup.CUDA_LIBRARY}),
    ],
)
def test_the_watchdog_is_built_where_it_is_asked_for(install, asked, cuda, built):
    done, libraries = install(SMOOTHIE_KERNELS_BUILD="1", SMOOTHIE_WATCHDOG=asked, SMOOTHIE_KERNELS_CUDA=cuda)
    assert done.returncode == 0, done.stderr
    assert libraries == built
    assert ("without the CUDA library with a watchdog: SMOOTHIE_KERNELS_CUDA=0" in done.stderr) == (cuda == "0")


def test_the_watchdog_is_in_its_library_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("SMOOTHIE_KERNELS_CUDA", raising=False)
    monkeypatch.setenv("TORCH_DIR", str(fake_torch(tmp_path)))
    monkeypatch.setenv("NVCC", str(fake_nvcc(tmp_path)))
    texts = []
    monkeypatch.setattr(setup, "run_ninja", lambda folder, text, targets=(): texts.append(text))
    for library in setup.LIBRARIES.values():
        library.build(tmp_path / library.file, tmp_path)
    assert [setup.WATCHDOG_FLAG in text for text in texts] == [False, False, True]
    assert (cuda.LIBRARY.name, cuda.WATCHDOG_LIBRARY.name) == (setup.CUDA_LIBRARY, setup.WATCHDOG_LIBRARY)


@pytest.mark.parametrize("wanted", ["", "1"])
@pytest.mark.parametrize(
    ("version", "cuda", "reason"),
    [
        (None, "", "no nvcc found"),
        ("12.4", "", "nvcc 12.4 is older than 12.5"),
        ("13.0", "0", "SMOOTHIE_KERNELS_CUDA=0"),
    ],
)
def test_left_out(install, tmp_path, wanted, version, cuda, reason):
    nvcc = fake_nvcc(tmp_path / "other", version) if version else "/nonexistent"
    done, libraries = install(NVCC=str(nvcc), SMOOTHIE_KERNELS_CUDA=cuda, SMOOTHIE_KERNELS_BUILD=wanted)
    assert done.returncode == 0, done.stderr
    assert f"installing without the CUDA library: {reason}" in done.stderr
    assert "without the CPU library" not in done.stderr
    assert libraries == {setup.CPU_LIBRARY}


@pytest.mark.parametrize("wanted", ["", "1"])
@pytest.mark.parametrize("failing", ["CPU", "CUDA"])
def test_a_failure_of_one_leaves_the_other(install, project, tmp_path, failing, wanted):
    if failing == "CPU":
        (project / "csrc/cpu/bindings.cpp").unlink()
        done, libraries = install(SMOOTHIE_KERNELS_BUILD=wanted)
        assert libraries == {setup.CUDA_LIBRARY}
    else:
        nvcc = fake_nvcc(tmp_path / "other", script="echo what is wrong >&2; exit 1")
        done, libraries = install(NVCC=str(nvcc), SMOOTHIE_KERNELS_BUILD=wanted)
        assert libraries == {setup.CPU_LIBRARY}
        assert "what is wrong" in done.stderr
    assert done.returncode == (1 if wanted else 0)
    what = f"cannot build the {failing} library" if wanted else f"installing without the {failing} library"
    assert f"{what}: the compiler failed; its messages are above" in done.stderr


# --- What it asks of its host, and its operators

built = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built")


@built
@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("c++")), reason="needs nm and a compiler")
def test_library_uses_only_the_stable_abi():
    symbols = abi.undefined_symbols(LIBRARY)
    assert "aoti_torch_get_data_ptr" in symbols
    assert not [symbol for symbol in symbols if symbol.startswith("cu")]
    assert abi.foreign_symbols(symbols, abi.stable_functions(setup.find_torch(setup.package_folders()))) == []


@built
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_library_is_loaded_without_cuda():
    entries = subprocess.run(["readelf", "-d", LIBRARY], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", entries)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if name.startswith(("libcu", "libnv", "libtorch_cuda"))]
    assert "RUNPATH" not in entries


OPERATORS = {"prepare", "score", "narrow", "stream", "merge", "nearest", "gaussian"}


@built
def test_library_registers_its_operators():
    code = f"""
import json, sys, torch
torch.ops.load_library({str(LIBRARY)!r})
schemas = {{s.name: str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("smoothie_kernels_cuda::")}}
on = {{name: torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in schemas}}
json.dump([schemas, on], sys.stdout)
"""
    done = run(setup.ROOT, "-c", code)
    assert done.returncode == 0, done.stderr
    schemas, on = json.loads(done.stdout)
    assert {name.partition("::")[2] for name in schemas} == OPERATORS
    assert all(on.values())
    assert all(schema.endswith("int stream) -> ()") for schema in schemas.values())


# --- What the kernels take


@pytest.mark.compilers
@pytest.mark.parametrize("watchdog", [False, True])
def test_kernels_fit(watchdog):
    """Every kernel of the table is there, on the matrix units, in registers; nothing waits that need not."""
    if watchdog and not cuda.WATCHDOG_LIBRARY.exists():
        pytest.skip("the CUDA library with a watchdog is not built")  # it takes as long as the library itself
    try:
        rows, general = check.check(watchdog)
    except (check.CannotCheck, setup.LeftOut) as reason:
        pytest.skip(f"the kernels cannot be looked into: {reason}")
    assert general == []
    assert {row["kernel"]: row["faults"] for row in rows if row["faults"]} == {}
    for row in rows:  # not zero because a tool prints something else today
        assert 8 <= row["registers"] <= 255
        if check.is_product(row["kernel"]):
            assert row["threads"] >= 128


@pytest.mark.parametrize(
    ("enum", "file", "count"), [("Mode", "params.h", len(check.MODES)), ("Noise", "rows.h", len(check.NOISES))]
)
def test_every_number_in_a_kernels_name_has_a_word(enum, file, count):
    text = (setup.ROOT / "csrc/cuda" / file).read_text()
    (body,) = re.findall(rf"enum class {enum} : int \{{(.*?)\}};", text, re.DOTALL)
    assert len(re.findall(r"\bk\w+", re.sub("//.*", "", body))) == count


PLACE = "_ZN8smoothie4cuda40_GLOBAL__N__2e9e3085_8_score_cu_818866c3"
SCORE = f"{PLACE}12score_kernelI13__nv_bfloat16LNS0_4ModeE5ELNS0_5NoiseE1EEEvNS1_14ScoreArgumentsE"
COPY = f"{PLACE}11copy_kernelEv"
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers, 1024 bytes smem
ptxas info    : Compile time = 14.039 ms
"""
CODE = """
Fatbin elf code:
================
	code for sm_90a
		Function : {name}
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*01a0*/              @!P0 UTMALDG.2D [UR8], [UR4] ;               /* 0x00000008040075b4 */
        /*0370*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0380*/                   {instruction} ;                         /* 0x0000740001007983 */
		..........
"""
ATTRIBUTES = """
.nv.info
	<0x1>
	Attribute:	EIATTR_MIN_STACK_SIZE
	Format:	EIFMT_SVAL
	Value:	function: {name}(0x3)	min stack size: 0x0

.nv.info.{name}
	<0x5>
	Attribute:	EIATTR_MAXREG_COUNT
	Format:	EIFMT_HVAL
	Value:	0xff
	<0x11>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x180 0x1 0x1 
	<0x12>
"""
GOOD = {"name": SCORE, "stack": 0, "stores": 0, "loads": 0, "registers": 168, "instruction": "EXIT"}
needs_names = pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")


def row_of(**other):
    (row,) = check.rows_of(*(text.format(**{**GOOD, **other}) for text in (LOG, CODE, ATTRIBUTES)))
    return row


@needs_names
def test_what_the_tools_say_is_read():
    numbers = {"registers": 168, "threads": 384, "spilled": 0, "static": 1024, "barriers": 2}
    numbers |= {"products": 1, "boxes": 1, "local": 0}
    row = row_of()
    assert {name: row[name] for name in numbers} == numbers
    assert row["kernel"] == "score bf16 weights one-field"


@needs_names
@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"stores": 388, "loads": 664}, "spills 1052 bytes"),
        ({"instruction": "LDL.64 R0, [R1+0x74]"}, "1 instructions on local memory"),
        ({"instruction": "@P1 STL [R1+0x74], R3"}, "1 instructions on local memory"),
        ({"registers": 176}, "has not 176 registers for each of 384 threads"),
    ],
)
def test_faults_are_found(other, fault, monkeypatch):
    monkeypatch.setattr(check, "dynamic_bytes", lambda: 0)
    assert row_of()["faults"] == []
    assert row_of(**other)["faults"] == [fault]


@needs_names
def test_faults_of_some_kernels(monkeypatch):
    monkeypatch.setattr(check, "dynamic_bytes", lambda: 0)
    no_bounds = [LOG.format(**GOOD), CODE.format(**GOOD), ""]
    (row,) = check.rows_of(*no_bounds)
    assert "it has no launch bounds" in row["faults"][0]
    bare = {**GOOD, "name": SCORE, "instruction": "EXIT"}
    code = CODE.format(**bare).replace("HGMMA", "FFMA").replace("UTMALDG", "LDGSTS")
    (row,) = check.rows_of(LOG.format(**bare), code, ATTRIBUTES.format(**bare))
    assert row["faults"] == ["has no products (no HGMMA)", "has no boxes (no UTMALDG)"]
    assert row_of(name=COPY)["kernel"] == "copy"
    monkeypatch.setattr(check, "dynamic_bytes", lambda: 227 << 10)
    assert row_of()["faults"] == ["takes more shared memory than a block has"]
    assert row_of(name=COPY)["faults"] == []  # which none of it is for


@pytest.mark.parametrize(
    "message",
    [
        "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.",
        "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register "
        "resources for the wgmma pipeline in the function '_Z6serialPfji'",
        "(C7517) warpgroup.wait is injected in around line 236 by compiler to allow use of registers defined by GMMA",
    ],
)
def test_costly_messages_are_found(message):
    harmless = "ptxas info    : (C7519) warpgroup.arrive is injected in around line 232 by compiler\n"
    log = harmless + LOG.format(**GOOD)
    assert check.costly_messages(log) == []
    assert check.costly_messages(log + f"ptxas info    : {message}\n") == [message]


def test_a_kernel_that_is_not_there_is_missed():
    rows = [{"kernel": name} for name in check.WANTED]
    assert len(check.WANTED) == len(set(check.WANTED)) == 2 * (1 + 3 + 3 + 4 + 2)
    assert check.missing(rows) == []
    assert check.missing([*rows[1:], {"kernel": rows[0]["kernel"] + "er"}]) == [rows[0]["kernel"]]
    assert check.missing([*rows[1:], {"kernel": rows[0]["kernel"] + " true"}]) == []


def test_tools_that_speak_otherwise_are_no_success():
    with pytest.raises(check.CannotCheck, match="not say as usual"):
        check.read_log(LOG.format(**GOOD).replace("spill stores", "stores spilled"))
    with pytest.raises(check.CannotCheck, match="other kernels"):
        check.rows_of(LOG.format(**GOOD), "", "")


def test_check_without_nvcc(tmp_path):
    done = run(setup.ROOT, "tests/cuda/check.py", NVCC="/nonexistent", PYTHONPATH=str(setup.ROOT))
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr == "cannot check the CUDA kernels: no nvcc found (set NVCC or CUDA_HOME, or put it on the PATH)\n"
    )
