"""From files of generated texts to their metrics: what `smoothie-kernels evaluate` does."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import smoothie_kernels
from smoothie_kernels.arguments import Parser
from smoothie_kernels.diffusion.files import in_turn
from smoothie_kernels.diffusion.scores import METRICS, missing, package_version, signature

DESCRIPTION = """\
Score generated texts. SAMPLES are files of JSON lines: "text", which may be empty, and where there are such "source"
and "reference", a string or a list of them. RESULTS gets one line per file; a file that has one, of the same content
and options, is not scored again. Nothing is downloaded.
"""
START = b'{"samples": '  # of a line of RESULTS


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Which metrics. A model that is given asks for its metric."""

    metrics: Sequence[str] | None = None  # None: all that can run
    lowercase: bool = False
    perplexity_model: str | None = None
    bertscore_model: str | None = None
    bertscore_layers: int | None = None
    mauve_model: str | None = None

    def __post_init__(self) -> None:
        for name in self.metrics or ():
            if name not in METRICS:
                raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {name!r}")
        if self.bertscore_layers is not None and self.bertscore_model is None:
            raise ValueError(f"bertscore_layers must come with bertscore_model, got {self.bertscore_layers} alone")

    def keywords(self, name: str) -> dict[str, Any]:
        """Of the metric's function, but for the columns."""
        model = getattr(self, f"{name}_model", None)
        given = {"model": model, "layers": self.bertscore_layers, "lowercase": self.lowercase}
        return {key: given[key] for key in (*METRICS[name].needs, *METRICS[name].options) if key in given}


class Samples(NamedTuple):
    path: str
    sha256: str
    texts: list[str]
    columns: dict[str, list[Any]]  # "references" and "sources", where the file has them


def read_samples(path: Path | str) -> Samples:
    """Raises ValueError: no such file; a line that is not as DESCRIPTION has it; a column in some lines only."""
    if not Path(path).is_file():
        raise ValueError(f"samples must be a file, got {str(path)!r}")
    raw = Path(path).read_bytes()
    rows = [_row(line, f"line {number} of {path}") for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    if not rows:
        raise ValueError(f"samples must have at least one line, got none in {str(path)!r}")
    texts, references, sources = (list(column) for column in zip(*rows, strict=True))
    columns = {"references": references, "sources": sources}
    for name, column in columns.items():
        count = len(column) - column.count(None)
        if 0 < count < len(rows):
            raise ValueError(f"{name[:-1]} must be in all lines or none, got {count} of {len(rows)} in {str(path)!r}")
    columns = {name: column for name, column in columns.items() if column[0] is not None}
    return Samples(str(path), hashlib.sha256(raw).hexdigest(), texts, columns)


def _row(line: bytes, where: str) -> tuple[str, list[str] | None, str | None]:
    try:
        row = json.loads(line)
    except ValueError as error:  # also where it is no UTF-8
        raise ValueError(f"samples must be lines of JSON, got {where}: {error}") from error
    if not isinstance(row, dict) or "text" not in row:
        raise ValueError(f'samples must be JSON objects with "text", got {where} without')
    if not isinstance(row["text"], str) or not isinstance(row.get("source"), str | None):
        raise ValueError(f"text and source must be strings, got another in {where}")
    reference = row.get("reference")
    references = [reference] if isinstance(reference, str) else reference
    right = isinstance(references, list) and references and all(isinstance(each, str) for each in references)
    if not right and references is not None:
        raise ValueError(f"reference must be a string or a list of them, got {reference!r} in {where}")
    return row["text"], references, row.get("source")


def evaluate(samples: Sequence[Path | str], out: Path | str, options: ScoreOptions) -> list[dict[str, Any]]:
    """Scores files of samples and appends a line for each to `out`, unless it is there; returns the lines.

    Raises:
        ValueError: samples or `out` that are not what they should be; a metric that was asked for and cannot run.
    """
    files = [read_samples(path) for path in samples]
    plans = [_plan(file, options) for file in files]
    known = _results(Path(out))
    lines = []
    for file, (keywords, left_out) in zip(files, plans, strict=True):
        same = {"samples": file.path, "sha256": file.sha256, "options": keywords}
        line = next((line for line in known if {key: line.get(key) for key in same} == same), None)
        if line is None:
            line = _scores(file, keywords) | {"left_out": left_out}
            known.append(line)
            with in_turn(Path(out), "ab") as results:
                results.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        lines.append(line)
    return lines


def _plan(file: Samples, options: ScoreOptions) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The metrics to compute with their keywords, and why others are left out."""
    keywords, left_out = {}, {}
    for name, metric in METRICS.items():
        given = options.keywords(name)
        asked = name in (options.metrics or ()) or given.get("model") is not None
        if options.metrics is not None and not asked:
            continue
        lacks = [need for need in metric.needs if need not in file.columns and given.get(need) is None]
        lacks = [f"{name}_model" if need == "model" else need for need in lacks]
        reason = f"it needs {' and '.join(lacks)}" if lacks else missing(name)
        if reason is None:
            keywords[name] = given
        elif asked:
            raise ValueError(f"metrics must be able to run, got {name!r} for {file.path!r}: {reason}")
        else:
            left_out[name] = reason
    return keywords, left_out


def _scores(file: Samples, keywords: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    line: dict[str, Any] = {"samples": file.path, "sha256": file.sha256, "texts": len(file.texts)}
    made_by = {}
    for name, given in keywords.items():
        columns = {need: file.columns[need] for need in METRICS[name].needs if need in file.columns}
        score = METRICS[name].compute(file.texts, **columns, **given)
        for key, value in (score if isinstance(score, Mapping) else {name: score}).items():
            line[key] = value if math.isfinite(value) else None
        if "lowercase" in given:
            made_by[name] = signature(name, columns["references"], **given)
    packages = sorted({METRICS[name].package or "torch" for name in keywords} | {"torch"})
    versions = {"smoothie-kernels": smoothie_kernels.__version__} | {name: package_version(name) for name in packages}
    return line | {"options": dict(keywords), "signatures": made_by, "versions": versions}


def _results(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier run. One that was half written when it was killed is taken out of the file."""
    if not path.exists() and path.parent.is_dir():
        return []
    if not path.is_file():
        raise ValueError(f"out must be a file in a folder that exists, got {str(path)!r}")
    with in_turn(path, "r+b") as file:  # else the half line may be another process's, which is writing it
        *whole, half = file.read().split(b"\n")
        for number, line in enumerate([*whole, half], 1):
            if line[: len(START)] != START[: len(line)]:  # before anything of another file is cut off
                raise ValueError(f"out must hold results of this command, got another line {number} of {str(path)!r}")
        file.truncate(sum(len(line) + 1 for line in whole))
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ValueError(f"out must hold lines of JSON, got {str(path)!r}: {error}") from error


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The scores of all files, and what was left out of any."""
    keys = list(dict.fromkeys(key for line in lines for key in line if not isinstance(line[key], str | dict)))
    rows = [["samples", *keys]]
    for line in lines:
        values = [line.get(key) for key in keys]
        rows.append([line["samples"], *("-" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    text += dict.fromkeys(f"left out: {name}, {why}" for line in lines for name, why in line["left_out"].items())
    return "\n".join(text)


def arguments_parser() -> Parser:
    parser = Parser(prog="smoothie-kernels evaluate", description=DESCRIPTION)
    parser.add_argument("samples", nargs="+", metavar="SAMPLES", help="as the sampler writes them")
    parser.add_argument("--out", required=True, metavar="RESULTS", help="JSON lines; appended to where it is there")
    names = ",".join(METRICS)
    parser.add_argument(
        "--metrics", type=lambda text: text.split(","), action="extend", help=f"of {names}; default: all it can"
    )
    parser.add_argument("--lowercase", action="store_true", help="BLEU and chrF take no notice of case")
    parser.add_argument("--perplexity-model", metavar="MODEL", help="causal model: a folder, or a name in the cache")
    parser.add_argument("--bertscore-model", metavar="FOLDER", help="encoder for BERTScore")
    parser.add_argument("--bertscore-layers", type=int, metavar="N", help="of it; default: bert_score's for its name")
    parser.add_argument("--mauve-model", metavar="FOLDER", help="model for MAUVE, with gpt2 or bert in its path")
    return parser


def command(arguments: list[str]) -> int:
    """`smoothie-kernels evaluate`: what is wrong with its options or files is one line on stderr, and exit status 2."""
    parser = arguments_parser()
    known, unknown = parser.parse_known_args(arguments)
    parser.refuse(unknown)
    given = vars(known)
    try:
        print(table(evaluate(given.pop("samples"), given.pop("out"), ScoreOptions(**given))))
    except (OSError, ValueError) as error:
        print(f"smoothie-kernels evaluate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
