"""The README's example runs, and the files it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_example():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(block, names)
    assert names["step"].smoothed.shape == (8, 64, 384)


def test_files_exist():
    for name in re.findall(r"`([\w./]+\.(?:py|md|h|cpp))`", README):
        assert (ROOT / name).exists() or (ROOT / "smoothie_kernels" / name).exists(), name
