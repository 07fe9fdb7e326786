"""Random command lines and damaged files for `train`, `sample` and `evaluate`: what must hold whatever is given.

    python tests/diffusion/fuzz_commands.py [--seed N] [--count 500] [--only CALL]

A call ends with exit status 0 and the files that it says, or with 1 or 2 and one line on stderr: no traceback, no
file changed but its own output, no checkpoint half written. Every call has its own copy of a small world of files and
its own random numbers, of (seed, call): --only repeats one, and says what it does.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before imports
HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

# ruff: noqa: E402
import datasets
import small
import torch
import training
from datasets import Dataset
from safetensors.torch import save_file
from transformers.utils import logging

from smoothie_kernels import cli
from smoothie_kernels.diffusion import sample_command, train
from smoothie_kernels.diffusion.model import SmoothieModel

SECONDS = 120  # for one call
ROWS = [("the baker made bread", "who made bread ?"), ("the king is old", "who is old ?"), ("a cat", "what is it ?")]
TRAIN = {
    "data": "data", "embeddings": "random:8", "tokenizer": "words", "layers": "1", "heads": "2",
    "condition_layers": "1", "self_condition_layers": "1", "source_length": "8", "target_length": "8", "steps": "2",
    "batch_size": "2", "eval_samples": "2", "warmup_steps": "1", "cpu": "true",
}  # fmt: skip
SAMPLE = {"steps": "2", "batch_size": "2", "cpu": "true", "truncate": "true"}
# What these may be given is small: more would only take long.
SMALL = {
    "steps", "batch_size", "layers", "heads", "condition_layers", "self_condition_layers", "source_length",
    "target_length", "hidden_size", "samples", "count", "workers", "eval_every", "save_every", "log_every",
}  # fmt: skip
WRONG = ["", "0", "-1", "nan", "x", "1.5", "null", "[1]", '{"a": 1}', "é", "\udcff", "true", "-"]
LARGE = ["inf", "1e400", "9" * 20, "9" * 400, "-9223372036854775809"]
PLACES = ["data", "train.csv", "odd/g[1]", "none", "words", "run", "table.safetensors", ".", "out.jsonl", "/dev/null"]
TEXTS = ["the cat", "", "[MASK] is it ?", "xyz", "a " * 40, "été", "- a", "[SEP]", "\n", "\0"]


def build(world: Path) -> None:
    """All files that calls may name; folders "run" and "free" hold checkpoints."""
    small.tokenizer().save_pretrained(world / "words")
    save_file({"table": torch.randn(49, 8)}, world / "table.safetensors")
    (world / "vectors.txt").write_text("the 1 2 3 4\ncat 2 3 4 5\nking 0 1 0 1\n")
    lines = "".join(json.dumps({"src": source, "trg": target}) + "\n" for source, target in ROWS)
    for folder in ("data", "odd/g[1]", "odd/g1"):
        (world / folder).mkdir(parents=True)
        for split in ("train", "validation"):
            (world / folder / f"{split}.jsonl").write_text(lines)
    (world / "packed").mkdir()
    (world / "packed" / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (world / "train.csv").write_text("source,target\n" + "".join(f'"{s}",{t}\n' for s, t in ROWS))
    (world / "array.json").write_text(json.dumps([{"source": source, "target": target} for source, target in ROWS]))
    Dataset.from_dict({"source": [s for s, _ in ROWS], "target": [t for _, t in ROWS]}).to_parquet(
        world / "rows.parquet"
    )
    (world / "options.yaml").write_text("layers: 1\nseed: 3\nsource: [the cat, a dog]\n")
    (world / "train.yaml").write_text("".join(f"{name}: {value}\n" for name, value in TRAIN.items()))
    for name, layers in (("run", 1), ("free", 0)):
        torch.manual_seed(1)
        model = training.model(eos_token_id=3, pad_token_id=0, condition_layers=layers)
        model.save_pretrained(world / name / "checkpoint-7")
        small.tokenizer().save_pretrained(world / name / "checkpoint-7")
    assert call("train", "trained", "--config=train.yaml", "--save-every=1") == 0
    assert call("sample", "run", "samples.jsonl", "--data=data", "--steps=2", "--cpu", "--truncate") == 0
    (world / "results.jsonl").write_text("")
    assert call("evaluate", "samples.jsonl", "--out=results.jsonl") == 0


def call(*arguments: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return cli.main(list(arguments))


# --- Random calls


class Call:
    loud = False  # whether what the command says is printed

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.damage: list[str] = []
        self.config: str | None = None
        self.variables: dict[str, str] = {}
        kind = self.random.choice(["train", "train", "sample", "sample", "evaluate"])
        self.arguments = [kind, *getattr(self, f"_{kind}")()]
        self.broken = self.random.random() < 0.05  # then its output is not known
        if self.broken:
            self.arguments = self._broken(self.arguments)
        if self.random.random() < 0.03:
            self.variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = self.random.choice(["1", "4", "x"])

    def _mostly(self, right: list[str], wrong: list[str], share: float = 0.1) -> str:
        return self.random.choice(wrong if self.random.random() < share else right)

    def _train(self) -> list[str]:
        self.output = self._mostly(["new", "new", "trained"], ["deep/new", "run", "train.csv", "", "words", "data"])
        options = dict(TRAIN)
        options["data"] = self._mostly(
            ["data", "packed", "train.csv", "array.json", "rows.parquet", "odd/g[1]"], PLACES
        )
        tables = ["random:8", "random:8", "table.safetensors", "vectors.txt"]
        options["embeddings"] = self._mostly(tables, ["run/checkpoint-7", "random:x", *PLACES])
        resume = ["--resume", "--steps=4"] if self.output == "trained" or self.random.random() < 0.1 else []
        if resume:  # as "trained" was
            options |= {"data": "data", "embeddings": "random:8", "save_every": "1"}
        return [self.output, *self._flags(train.arguments_parser(), options), *resume]

    def _sample(self) -> list[str]:
        pick = self.random.choice
        files = ["-", "new.jsonl", "new.jsonl", "samples.jsonl"]
        self.output = self._mostly(files, ["deep/new.jsonl", "data", "train.csv", "results.jsonl", ""])
        folder = self._mostly(["run", "run", "free", "run/checkpoint-7"], PLACES)
        options = dict(SAMPLE)
        what = "count" if folder == "free" and self.random.random() < 0.7 else pick(["data", "source"])
        what = self._mostly([what], ["data", "source", "count", "nothing", "both"])
        if what in ("data", "both"):
            options |= {
                "data": self._mostly(["data"], PLACES),
                "split": self._mostly(["validation", "train"], ["x", ""]),
            }
        if what in ("source", "both"):
            options["source"] = pick(TEXTS)
        if what == "count":
            options["count"] = pick(["1", "3"])
        for name in ("template", "prefix"):
            if self.random.random() < 0.1:
                options[name] = pick(TEXTS)
        return [
            folder,
            self.output,
            *self._flags(sample_command.arguments_parser(), options),
            *pick([[], ["--overwrite"]]),
        ]

    def _evaluate(self) -> list[str]:
        pick = self.random.choice
        self.output = self._mostly(["new.jsonl", "results.jsonl"], ["deep/x", "data", "train.csv", "", "samples.jsonl"])
        files = [self._mostly(["samples.jsonl"], ["data/train.jsonl", *PLACES]) for _ in range(pick([1, 1, 2]))]
        flags = ["", "", "--metrics=bleu,distinct", "--lowercase", "--metrics=x", "--perplexity-model=words",
                 "--bertscore-layers=3", "--mauve-model=x"]  # fmt: skip
        return [*files, f"--out={self.output}", *pick(flags).split()]

    def _flags(self, parser: argparse.ArgumentParser, options: dict[str, str]) -> list[str]:
        """The options with some changes, some of them in a file."""
        pick, actions = self.random.choice, {a.dest: a for a in reversed(parser._actions) if a.option_strings}
        for _ in range(pick([0, 0, 1, 1, 2, 3])):
            name = pick(sorted(actions.keys() - {"help", "config", "resume", "compile"}))
            action = actions[name]
            good = {int: ["1", "2"], float: ["0.5", "1"]}.get(action.type, ["true", "false"] if action.const else [""])
            wrong = WRONG + ([] if name in SMALL else LARGE)
            options[name] = self._mostly([str(choice) for choice in action.choices or good], wrong, 0.3)
            if self.random.random() < 0.1:
                del options[name]
        names = sorted(options)
        in_file = [name for name in names if self.random.random() < 0.5] if self.random.random() < 0.2 else []
        if in_file:
            self.config = "".join(f"{name}: {pick(['{}', '{!r}'])}\n".format(options[name]) for name in in_file)
        flags = [f"--{pick([name, name.replace('_', '-')])}={options[name]}" for name in names if name not in in_file]
        self.random.shuffle(flags)
        return flags + (["--config=fuzz.yaml"] if in_file else [])

    def _broken(self, arguments: list[str]) -> list[str]:
        words = list(arguments)
        place = self.random.randrange(1, len(words) + 1)
        what = self.random.choice(["drop", "double", "word", "cut"])
        if what == "word":
            words.insert(
                place, self.random.choice(["--", "-x", "--stepz=3", "x", "--config", "--config=none.yaml", ""])
            )
        elif place < len(words):
            words[place : place + 1] = {"drop": [], "double": [words[place]] * 2, "cut": [words[place][:-3]]}[what]
        return words

    def prepare(self, world: Path) -> None:
        """Writes its config, and damages some file in half of the calls."""
        if self.config is not None:
            (world / "fuzz.yaml").write_text(self.config, encoding="utf-8", errors="surrogateescape")
        if self.random.random() < 0.5:
            files = sorted(path for path in world.rglob("*") if path.is_file())
            named = [path for path in files if any(path.relative_to(world).parts[0] in word for word in self.arguments)]
            path = self.random.choice(self.random.choice([files, named or files]))
            how = self.random.choice(["cut", "empty", "flip", "bad", "gone", "folder", "more"])
            content = path.read_bytes()
            place = self.random.randrange(len(content) + 1)
            self.damage = [how, str(path.relative_to(world)), str(place)]
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how != "gone":
                path.write_bytes({
                    "cut": content[:place], "empty": b"", "flip": content[:place] + b"7" + content[place + 1 :],
                    "bad": content[:place] + b"\xff" + content[place:], "more": content + b"\nx",
                }[how])  # fmt: skip


# --- What must hold


def run(given: Call) -> tuple[object, list[str]]:
    """Makes the call here and now; returns its exit status and what was wrong."""
    before, out, err = contents(Path()), io.StringIO(), io.StringIO()
    os.environ |= given.variables
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(list(given.arguments))
    except SystemExit as end:
        status = end.code
    except BaseException:
        return "error", [traceback.format_exc()]
    finally:
        signal.alarm(0)
        for name in given.variables:
            del os.environ[name]
    after = contents(Path())
    faults = [
        f"changed: {name}" for name in before if before[name] != after.get(name) and not given_up(name, given, status)
    ]
    if given.loud:
        print(out.getvalue(), err.getvalue())
    command = given.arguments[0]
    said = [line for line in err.getvalue().splitlines() if line.startswith(f"smoothie-kernels {command}: ")]
    if "Traceback" in err.getvalue() + out.getvalue():
        faults.append(f"a traceback is printed: {err.getvalue()}")
    if status in (1, 2):
        if len(said) != 1 or said[0].strip().endswith(":"):
            faults.append(f"status {status} with {len(said)} lines: {err.getvalue()!r}")
        if command != "train":
            faults += [f"left behind: {name}" for name in after.keys() - before.keys() if not name.endswith(".lock")]
    elif status != 0:
        faults.append(f"status {status}")
    elif "usage:" not in out.getvalue() and not given.broken:
        faults += outputs(given, out.getvalue())
    faults += [f"half written: {name}" for name in after if ".partial" in name or name.endswith((".part", ".tmp"))]
    faults += broken_checkpoints(before.keys(), after.keys())
    return status, faults


def given_up(name: str, given: Call, status: object) -> bool:
    """Whether a call may change a file: its own output, where it ends well; checkpoints go as newer ones come."""
    own = {"train": f"{given.output}/", "sample": given.output, "evaluate": given.output}[given.arguments[0]]
    return status == 0 and name.startswith(own)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def outputs(given: Call, said: str) -> list[str]:
    """What is wrong with the files of a call that ended well."""
    command, output = given.arguments[0], Path(given.output)
    if command == "train":
        last = Path(said.splitlines()[-1].removeprefix("trained: "))
        return [] if (last / "model.safetensors").is_file() and last.is_relative_to(output) else [f"no {last}"]
    text = said if given.output == "-" else output.read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
    except ValueError as error:
        return [f"a line is no JSON: {error}"]
    if command == "sample" and [row["id"] for row in rows] != [*range(len(rows))]:
        return [f"ids are {[row['id'] for row in rows]}"]
    return [] if rows else ["no lines"]


def broken_checkpoints(before: set[str], after: set[str]) -> list[str]:
    """New checkpoints that do not load."""
    folders = {Path(name).parent for name in after - before if Path(name).parent.name.startswith("checkpoint-")}
    return [f"half written: {folder}: {fault}" for folder in sorted(folders) if (fault := cannot_load(folder))]


def cannot_load(folder: Path) -> str | None:
    try:
        SmoothieModel.from_pretrained(folder)
    except Exception as error:
        return str(error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"{SECONDS} s")))
    print(f"seed {given.seed}", flush=True)
    start, failed, statuses = time.monotonic(), [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        world, copy = Path(folder) / "world", Path(folder) / "copy"
        world.mkdir()
        os.chdir(world)
        build(world)
        for number in range(given.count) if given.only is None else [given.only]:
            shutil.copytree(world, copy)
            os.chdir(copy)
            one = Call(given.seed, number)
            one.prepare(copy)
            if given.only is not None:
                print(one.arguments, one.damage, one.config, one.variables, flush=True)
                one.loud = True
            status, faults = run(one)
            statuses[f"{one.arguments[0]} {status}"] += 1
            if faults:
                failed.append(number)
                print(f"\nCALL {number}: {one.arguments} {one.damage} {one.config!r} {one.variables}")
                print(*faults, sep="\n")
                print(f"again: python {HERE.name} --seed {given.seed} --only {number}", flush=True)
            os.chdir(world)
            shutil.rmtree(copy)
        os.chdir(HERE.parent)
    print(*(f"exit status of {name}: {count} times" for name, count in sorted(statuses.items())), sep="\n")
    print(f"{statuses.total()} calls in {time.monotonic() - start:.0f} s, {len(failed)} failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
