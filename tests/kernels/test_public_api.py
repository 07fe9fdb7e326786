"""The names and signatures that users hold on to, and the direction of imports."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import smoothie_kernels
from smoothie_kernels import cli, dispatch

PACKAGE = Path(smoothie_kernels.__file__).parent
# A module may import only what stands left of it here. Backends are loaded by name, when they are needed; what they
# take and give is in backends/__init__.py.
LAYERS = [
    "stream", "dispatch", "words", "checks", "recall", "library", "average", "metric", "moments", "noise", "vocabulary",
    "topk", "ops", "testing", "arguments", "cli",
]  # fmt: skip
# The same among the modules of smoothie_kernels.diffusion, which use the package by its public names, and three
# modules of it.
DIFFUSION = [
    "schedules", "noising", "solvers", "options", "states", "live", "sampling", "generation", "layers", "model",
    "embeddings", "tokens", "batches", "reading", "files", "data", "loss", "evaluation", "ema", "ranks",
    "fingerprints", "checkpoint", "metrics", "surroundings", "trainer", "summary", "flags", "train", "pipeline",
    "sample_file", "sample_command", "scores", "evaluate",
]  # fmt: skip
# The same in smoothie_kernels.check, which uses whatever it checks.
CHECK = ["findings", "isolate", "probes", "cuda_kernels", "plan", "machine", "run", "command"]
PUBLIC = {*smoothie_kernels.__all__, "checks", "metric", "stream", "vocabulary", "diffusion"}
BACKEND_FUNCTIONS = {"supports", "column_bias", "step_fwd", "step_bwd", "average", "gaussian"}


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_names():
    assert set(smoothie_kernels.__all__) == {
        "NearestToken", "SmoothieStep", "TopK", "Vocabulary", "expected_recall", "fused_smoothie_step",
        "nearest_token", "noise",
    }  # fmt: skip
    assert smoothie_kernels.SmoothieStep._fields == ("smoothed", "tokens", "noisy_tokens", "lse", "topk")
    assert smoothie_kernels.TopK._fields == ("values", "indices", "tail_mass")
    assert smoothie_kernels.NearestToken._fields == ("tokens", "distance")


def test_signatures():
    none = inspect.Parameter.empty
    assert parameters(smoothie_kernels.fused_smoothie_step) == [
        ("x", none), ("embeddings", none), ("mu", none), ("std", none), ("sigma_min", 1.5), ("seed", None),
        ("offset", 0), ("field_weights", None), ("row_offset", 0), ("row_ids", None), ("topk", None),
        ("recall_target", 1.0), ("smooth", "full"), ("workspace", 2**28), ("backend", "auto"),
    ]  # fmt: skip
    assert parameters(smoothie_kernels.expected_recall) == [
        ("V", none), ("K", none), ("buckets", none), ("keep", none),
    ]  # fmt: skip
    assert parameters(smoothie_kernels.nearest_token) == [("x", none), ("embeddings", none), ("backend", "auto")]
    assert parameters(smoothie_kernels.noise.gaussian)[:7] == [
        ("rows", none), ("cols", none), ("seed", none), ("offset", 0), ("field_weights", None), ("row_offset", 0),
        ("row_ids", None),
    ]  # fmt: skip


def test_backends_have_the_same_functions():
    signatures = {}
    for name in (*dispatch.BACKENDS, *dispatch.BY_NAME):
        module = dispatch.load(name)
        signatures[name] = {f: list(inspect.signature(getattr(module, f)).parameters) for f in BACKEND_FUNCTIONS}
    assert all(s == signatures["reference"] for s in signatures.values()), signatures


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("smoothie_kernels"):
            inside = node.module.removeprefix("smoothie_kernels").lstrip(".")
            names |= {inside.split(".")[0]} if inside else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("smoothie_kernels.")}
    return names


def test_imports_go_downward():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(LAYERS)
    for position, name in enumerate(LAYERS):
        more = {"library": {"backends"}, "average": {"backends"}, "cli": {"backends", "check"}}.get(name, set())
        allowed = set(LAYERS[:position]) | more
        assert imported(PACKAGE / f"{name}.py") <= allowed, name
    for path in (PACKAGE / "backends").rglob("*.py"):
        assert imported(path) <= {"stream", "noise", "recall", "backends"}, path


def test_imports_of_diffusion_go_downward():
    folder = PACKAGE / "diffusion"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(DIFFUSION)
    for position, name in enumerate(DIFFUSION):
        path = folder / f"{name}.py"
        private = {"summary": {"dispatch"}, "flags": {"arguments"}, "evaluate": {"arguments"}}
        assert imported(path) <= PUBLIC | private.get(name, set()), name
        pattern = re.compile(r"^from smoothie_kernels\.diffusion(?:\.(\w+))? import (\w+)", re.MULTILINE)
        inside = {module or first for module, first in pattern.findall(path.read_text())}
        assert inside <= set(DIFFUSION[:position]), name


def test_imports_of_check_go_downward():
    folder = PACKAGE / "check"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(CHECK)
    for position, name in enumerate(CHECK):
        path = folder / f"{name}.py"
        assert imported(path) <= {*LAYERS, "backends", "check", *smoothie_kernels.__all__} - {"cli"}, name
        pattern = re.compile(r"^from smoothie_kernels\.check(?:\.(\w+))? import (.+)", re.MULTILINE)
        inside = {
            n
            for module, names in pattern.findall(path.read_text())
            for n in ([module] if module else names.split(", "))
        }
        assert inside <= set(CHECK[:position]), name


def test_the_package_needs_no_trainer():
    """Nor do the diffusion package's own schedules and noising need transformers or datasets."""
    program = """if True:
        import sys, smoothie_kernels, smoothie_kernels.cli, smoothie_kernels.check.command, smoothie_kernels.diffusion
        print([name for name in ("transformers", "datasets", "accelerate", "triton") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_doctor_names_every_backend(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out
    for name in (*dispatch.BACKENDS, *dispatch.BY_NAME):
        assert f"\n  {name} " in lines
    assert "reference  yes" in lines


def test_triton_is_left_alone_until_it_is_asked_for():
    """Torch may import triton with its compiler; this package's own kernels, which need it, stay where they are."""
    program = """if True:
        import sys, torch, smoothie_kernels
        print("triton" in sys.modules)
        smoothie_kernels.fused_smoothie_step(torch.randn(3, 4), torch.randn(5, 4), 0.1, 0.9, backend="reference")
        print(any(name.startswith("smoothie_kernels.backends.triton") for name in sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_transformers_auto_classes_know_the_model(tmp_path):
    pytest.importorskip("transformers", reason="comes with the extra `train`")
    (tmp_path / "config.json").write_text('{"model_type": "smoothie"}')
    program = f"""if True:
        import smoothie_kernels.diffusion
        from transformers import AutoModel, AutoConfig
        config = AutoConfig.from_pretrained({str(tmp_path)!r})
        print(AutoModel._model_mapping[type(config)].__name__, AutoModel._model_mapping[type(config)].__module__)
    """
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.stdout.split() == ["SmoothieModel", "smoothie_kernels.diffusion.model"], done.stderr


def test_diffusion_s_names():
    from smoothie_kernels import diffusion

    pytest.importorskip("transformers", reason="comes with the extra `train`")
    pytest.importorskip("accelerate", reason="comes with the extra `train`")
    lazy = {name for names in diffusion._MODULES.values() for name in names}
    assert lazy < set(diffusion.__all__)
    assert all(getattr(diffusion, name).__name__ == name for name in lazy)
    with pytest.raises(AttributeError, match="has no attribute 'Sampler'"):
        diffusion.Sampler  # noqa: B018
