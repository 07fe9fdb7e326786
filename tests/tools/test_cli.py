"""What all commands share."""

import subprocess
import sys

import pytest

from smoothie_kernels import cli


@pytest.mark.parametrize("buffered", [True, False])
def test_results_that_cannot_be_printed(buffered, monkeypatch, capsys):
    """One line and exit status 1, whether it shows at once or when Python writes what it has kept."""
    monkeypatch.setattr(cli, "doctor", lambda: "a line\n" * 10)
    with open("/dev/full", "w", buffering=-1 if buffered else 1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["doctor"]) == 1
    # Its end has written the rest, as Python does with that of stdout.
    said = capsys.readouterr().err
    assert said == "smoothie-kernels doctor: [Errno 28] No space left on device\n"


def test_a_command_says_once_that_nobody_reads(monkeypatch, capsys):
    """It has said so itself, and the rest is still in the buffer."""

    def command(*_):
        print("a line")
        print("smoothie-kernels check: no reader", file=sys.stderr)
        return 1

    monkeypatch.setattr(cli, "run", command)
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE, text=True)
    reader.wait()
    monkeypatch.setattr(sys, "stdout", reader.stdin)
    assert cli.main(["check"]) == 1
    reader.stdin.close()
    assert capsys.readouterr().err == "smoothie-kernels check: no reader\n"
