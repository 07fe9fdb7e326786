"""Kills `train` and `sample` at random moments and starts them again: they end as unbroken runs do. Too long for CI.

python tests/kills.py [--kills N] [--seed S]

Then the two commands as docs/training.md and docs/sampling.md write them for torchrun: one run, one file.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import forks
import small
import torch
import training

from smoothie_kernels import cli
from smoothie_kernels.diffusion import pipeline, sample_command, train, trainer  # noqa: F401  before the forks

STEPS = 40
MODEL = (
    "--layers=2", "--heads=2", "--condition-layers=1", "--self-condition-layers=1", "--source-length=10",
    "--target-length=8", "--embeddings=random:16", "--warmup-steps=5", "--batch-size=4",
)  # fmt: skip
TRAIN = (
    *MODEL, f"--steps={STEPS}", "--dropout=0.1", "--ema=0.9", "--trainable-embeddings", "--eval-every=7",
    "--eval-samples=8", "--save-every=3", "--log-every=2", "--cpu", "--resume=auto",
)  # fmt: skip
SAMPLE = ("--steps=10", "--batch-size=2", "--samples=4", "--truncate", "--cpu")
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        prove(Path(folder), given.kills, random.Random(given.seed))


def prove(folder: Path, kills: int, draw: random.Random) -> None:
    town(folder)
    commands = {"train": lambda out: trains(folder, out), "sample": lambda out: samples(folder, out)}
    whole, seconds = {}, {}
    for name, command in commands.items():
        whole[name] = folder / f"{name}-whole" / "out"
        seconds[name] = timed(folder, name, lambda command=command, out=whole[name]: command(out))
    left: dict[str, set[str]] = {name: set() for name in commands}
    for number in range(kills):
        name = ("train", "sample")[number % 2]
        out = folder / f"{name}-{number}" / "out"
        out.parent.mkdir()
        moment = kill(lambda: commands[name](out), seconds[name], draw)  # noqa: B023
        left[name] |= {path.name for path in out.parent.rglob("*") if path.name.startswith((".partial", "texts"))}
        status = forks.end(forks.start(quiet(lambda: commands[name](out))))  # noqa: B023
        if status:
            raise SystemExit(f"kill {number}: {name}, killed after {moment:.2f} s, ended with status {status}")
        compare(name, out, whole[name], f"kill {number}: {name}, killed after {moment:.2f} s")
        shutil.rmtree(out.parent)
        print(f"kill {number + 1}: {name} after {moment:.2f} of {seconds[name]:.2f} s: as unbroken", flush=True)
    print(f"{kills} kills, {kills} runs that end as unbroken ones; half written when killed: {left}", flush=True)
    launched(folder)
    print("torchrun, two ranks: the losses of one process, the file of one process")


def town(folder: Path) -> None:
    (folder / "town").mkdir()
    for split, count in (("train", 30), ("validation", 12)):
        pairs = [("the baker made bread", f"who made bread {'?' * (k % 3 + 1)}") for k in range(count)]
        lines = [json.dumps({"src": source, "trg": target}) + "\n" for source, target in pairs]
        (folder / "town" / f"{split}.jsonl").write_text("".join(lines))
    small.tokenizer().save_pretrained(folder / "words")
    training.model(eos_token_id=3, pad_token_id=0).save_pretrained(folder / "model")
    small.tokenizer().save_pretrained(folder / "model")


def trains(folder: Path, out: Path) -> int:
    data = ("--data", str(folder / "town"), "--tokenizer", str(folder / "words"))
    datasets.config.HF_DATASETS_CACHE = out.parent / "cache"
    return cli.main(["train", str(out), *data, *TRAIN])


def samples(folder: Path, out: Path) -> int:
    datasets.config.HF_DATASETS_CACHE = out.parent / "cache"
    return cli.main(["sample", str(folder / "model"), str(out), "--data", str(folder / "town"), *SAMPLE])


def quiet(command: Callable[[], int]) -> Callable[[], int]:
    """Its output goes into a file that is shown where it fails."""

    def run() -> int:
        kept = os.dup(2)
        with tempfile.TemporaryFile("w+") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status = command()
            if status:
                log.seek(0)
                os.write(kept, log.read().encode()[-2000:])
        return status

    return run


def timed(folder: Path, name: str, command: Callable[[], int]) -> float:
    (folder / f"{name}-whole").mkdir()
    start = time.perf_counter()
    if status := forks.end(forks.start(quiet(command))):
        raise SystemExit(f"{name}: the unbroken run ended with status {status}")
    return time.perf_counter() - start


def kill(command: Callable[[], int], seconds: float, draw: random.Random) -> float:
    """After how many seconds; again where it had ended by then."""
    while True:
        moment = draw.uniform(0, seconds)
        process = forks.start(quiet(command))
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        if forks.end(process) == -signal.SIGKILL:
            return moment


def compare(name: str, out: Path, whole: Path, what: str) -> None:
    if name == "sample":
        same = out.read_bytes() == whole.read_bytes()
        clean = {path.name for path in out.parent.iterdir()} == {"out", "out.options.json", "cache"}
    else:
        last, wanted = (path / f"checkpoint-{STEPS}" for path in (out, whole))
        states = training.weights(last), training.weights(wanted)
        same = states[0].keys() == states[1].keys()
        same = same and all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
        same = same and (last / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
        same = same and (out / "validation.csv").read_bytes() == (whole / "validation.csv").read_bytes()
        same = same and column(out / "metrics.csv", "step") == column(whole / "metrics.csv", "step")
        clean = {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    if not (same and clean):
        raise SystemExit(f"{what}: {'another result' if clean else 'files are left'}")


def column(path: Path, name: str) -> list[str]:
    with path.open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def launched(folder: Path) -> None:
    """Two ranks and one process, neither with --cpu where there is no GPU."""
    flags = ["--cpu"] if torch.cuda.is_available() else []
    data = ["--data", str(folder / "town"), "--tokenizer", str(folder / "words"), *MODEL]
    numbers = {}
    for name, start in (("two", LAUNCH), ("one", (sys.executable, "-m"))):
        run, texts = folder / f"run-{name}", folder / f"texts-{name}"
        run_flags = [*data, "--steps=12", "--log-every=1", "--save-every=6", "--eval-every=6", "--eval-samples=8"]
        program([*start, "smoothie_kernels.cli", "train", str(run), *run_flags, *flags])
        sample = [str(folder / "model"), str(texts), "--data", str(folder / "town"), "--truncate", "--batch-size=2"]
        program([*start, "smoothie_kernels.cli", "sample", *sample, "--steps=5", *flags])
        numbers[name] = [column(run / "metrics.csv", key) for key in ("step", "loss", "gradient_norm")]
        assert sorted(path.name for path in run.iterdir()) == [
            "checkpoint-12", "checkpoint-6", "metrics.csv", "validation.csv"
        ]  # fmt: skip
    assert numbers["one"][0] == numbers["two"][0]
    one, two = (torch.tensor([[float(value) for value in row] for row in numbers[name]]) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert (folder / "texts-two").read_bytes() == (folder / "texts-one").read_bytes()


def program(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
