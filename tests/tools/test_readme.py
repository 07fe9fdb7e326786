"""The README's example runs, and the files it names exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_example():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(block, names)
    assert names["step"].smoothed.shape == (8, 64, 384)


def test_files_exist():
    for name in re.findall(r"`([\w./]+\.(?:py|md|h|cpp))`", README):
        assert (ROOT / name).exists() or (ROOT / "smoothie_kernels" / name).exists(), name


PARSERS = {"train": "train", "sample": "sample_command", "evaluate": "evaluate"}  # modules of the commands
OWN = {"docs/training.md": "train", "docs/sampling.md": "sample"}  # the command whose flags a page names in its text


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/sampling.md"])
def test_flags_of_the_commands_exist(page, name):
    pytest.importorskip("accelerate", reason="comes with the extra `train`")
    pytest.importorskip("datasets", reason="comes with the extra `train`")
    parser = import_module(f"smoothie_kernels.diffusion.{PARSERS[name]}").arguments_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    text = (ROOT / page).read_text()
    commands = re.findall(rf"^smoothie-kernels {name} (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert commands or page == "docs/training.md"
    mentioned = set(re.findall(r"`(--[a-z-]+)", text)) if OWN.get(page) == name else set()
    for flag in mentioned.union(*(re.findall(r"(?<= )--[a-z0-9-]+", command) for command in commands)):
        assert flag in known | {"--nproc-per-node"}, flag


def test_training_example():
    pytest.importorskip("transformers", reason="comes with the extra `train`")
    batch = {"target": torch.ones(2, 5, dtype=torch.int64), "target_mask": torch.ones(2, 5, dtype=torch.bool)}
    batch |= {name.replace("target", "source"): tensor for name, tensor in batch.items()}
    names: dict = {"table": torch.randn(30522, 384), "batch": batch, "step": 3, "t": torch.rand(2), **batch}
    names |= {"smoothed": torch.randn(2, 5, 384), "self_condition": None}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), flags=re.S):
        exec(block, names)
    assert names["predicted"].shape == (2, 5, 384)


def test_sampling_example(monkeypatch):
    pytest.importorskip("datasets", reason="comes with the extra `train`")
    import small
    import training

    from smoothie_kernels.diffusion import SmoothiePipeline

    model = training.model(eos_token_id=3, pad_token_id=0, source_length=20)
    monkeypatch.setattr(SmoothiePipeline, "from_pretrained", lambda _: SmoothiePipeline(model, small.tokenizer()))
    table = torch.randn(50, 12)
    names: dict = {"sources": ["a cat", "the king"], "table": table, "f": lambda smoothed, *_: smoothed}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/sampling.md").read_text(), flags=re.S):
        exec(block, names)
    assert names["samples"].tokens.shape == (16, 64)
