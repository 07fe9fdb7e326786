"""From a checkpoint to a file of texts: what `smoothie-kernels sample` does."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState

from smoothie_kernels.diffusion import fingerprints, ranks
from smoothie_kernels.diffusion.data import read_text
from smoothie_kernels.diffusion.flags import Parser, Several, named, not_empty
from smoothie_kernels.diffusion.options import SampleOptions, check_not_empty, check_range, option
from smoothie_kernels.diffusion.pipeline import SmoothiePipeline, newest_checkpoint
from smoothie_kernels.diffusion.sample_file import SampleFile

USAGE = "smoothie-kernels sample CHECKPOINT OUTPUT [options]"
DESCRIPTION = """\
Sample texts from a trained model. CHECKPOINT is a checkpoint-N folder, or a training run's folder, of which it takes
the newest. OUTPUT gets one JSON object per line: id, text, steps, and source and reference where there are such; -
prints them. A killed run goes on where it was with the same command.
"""
EPILOG = """\
  smoothie-kernels sample runs/questions questions.jsonl --data question-generation --limit 64 --steps 50
  smoothie-kernels sample runs/questions - --source "Copper conducts electricity better than iron." --samples 4
  smoothie-kernels sample runs/questions - --source "..." --template "what does [MASK] [MASK] better than iron ?"
"""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """For what. Without any of these an unconditional model gives --count texts."""

    _argument_group_name = "text"

    data: str | None = option(None, "sources and references: a shipped sample, a folder, a file or a Hugging Face name")
    split: str = option("validation", "of --data")
    source_column: str | None = option(None, "column of the source; default: looked for by the usual names")
    target_column: str | None = option(None, "column of the reference; default: looked for by the usual names")
    limit: int | None = option(None, "only the first rows of --data")
    source: list[str] | None = field(
        default=None, metadata={"help": "sources themselves, instead of --data; may be given again", "action": Several}
    )
    count: int | None = option(None, "how many texts, where nothing else says it")
    samples: int = option(1, "of each source")
    template: str | None = option(None, "a whole text in which [MASK] stands for every token to fill in")
    prefix: str | None = option(None, "how texts begin")
    truncate: bool = option(False, "cut sources that are longer than the model's, as training does")
    batch_size: int = option(16, "samples at once")
    cpu: bool = option(False, "on the CPU although there is a GPU")
    overwrite: bool = option(False, "begin OUTPUT again where it is there")

    def __post_init__(self) -> None:
        check_range(self, 1, float("inf"), "samples", "batch_size", "limit", "count")
        check_not_empty(self, "data", "split", "source_column", "target_column")
        if self.data is not None and self.source is not None:
            raise ValueError(f"source must be None where there are data, got {self.source!r}")
        if self.count is not None and (self.data is not None or self.source is not None):
            raise ValueError(f"count must be None where data or source say how many texts, got {self.count}")
        for name in ("limit", "source_column", "target_column"):  # else they would be lost
            if self.data is None and getattr(self, name) is not None:
                raise ValueError(f"{name} must be None without data, got {getattr(self, name)!r}")


def sample(checkpoint: Path | str, output: str, text: TextOptions, options: SampleOptions) -> int:
    """Writes samples to a file, or on to its end; returns how many are in it. Several processes share the batches.

    Raises:
        ValueError: options that are wrong, or do not fit the model, the data, or the samples that are there.
        OSError: a file that cannot be written.
    """
    state = ranks.join(text.cpu)
    with ExitStack() as stack:
        stack.callback(state.destroy_process_group)
        file = None if output == "-" else SampleFile(output)
        if file is not None:
            ranks.on_main(lambda: stack.enter_context(file.locked()))
        folder = ranks.on_main(lambda: newest_checkpoint(checkpoint))
        device = state.device if state.device.type == "cuda" else "cpu"
        pipeline = SmoothiePipeline.from_pretrained(folder, device=device)
        rows = _rows(text, bool(pipeline.model.config.condition_layers))
        sources = [row["source"] for row in rows] if rows and "source" in rows[0] else None
        count = len(rows) or text.count or 1
        total, done = count * text.samples, 0
        if file is not None:
            made_by = fingerprints.of_model(pipeline.model, pipeline.tokenizer)
            record = asdict(text) | asdict(options) | {"checkpoint": made_by}
            begin = partial(file.start, batch_size=text.batch_size, overwrite=text.overwrite)
            done = ranks.on_main(lambda: begin(record, rows, text.samples, total))
        batches = pipeline.stream(
            sources, count=count, samples=text.samples, templates=text.template, prefixes=text.prefix, first_id=done,
            batch_size=text.batch_size, part=(state.process_index, state.num_processes), truncate=text.truncate,
            progress=sys.stderr.isatty() and state.is_main_process, options=options,
        )  # fmt: skip
        empty = Counter[str]()
        for batch in batches:
            empty.update(pipeline.names(each.tokens) for each in batch if not each.text)
            told = [rows[each.id // text.samples] if rows else {} for each in batch]
            made = [
                {"id": each.id, "text": each.text, "steps": each.steps} | row
                for each, row in zip(batch, told, strict=True)
            ]
            lines = [line for part in ranks.gathered(made) for line in part]
            if file is not None:
                ranks.on_main(partial(file.write, lines))
            elif state.is_main_process:
                print(*(json.dumps(line, ensure_ascii=False) for line in lines), sep="\n", flush=True)
        if file is not None:
            ranks.on_main(file.finish)
        if empty := sum(ranks.gathered(empty), Counter[str]()):
            seen = "; ".join(f"{count:,} times {names}" for names, count in empty.most_common(3))
            made_now = f"{empty.total():,} of {total - done:,} texts are empty"
            print(f"{made_now}, their tokens are: {seen}", file=sys.stderr)
    return max(total, done)


def _rows(text: TextOptions, conditional: bool) -> list[dict[str, str]]:
    """Source and reference of every text, as far as there are such."""
    names = {"source": "source", "target": "reference"}
    if conditional and text.source is None and text.data is None:
        raise ValueError("data or source must be given for a model with a source, got neither")
    if not conditional and text.source is not None:
        raise ValueError(f"source must be None for a model without one, got {text.source!r}")
    if text.source is not None:
        return [{"source": source} for source in text.source]
    if text.data is None:
        return []
    read = read_text(
        text.data, text.split, source_column=text.source_column if conditional else None,
        target_column=text.target_column, unconditional=not conditional,
    )  # fmt: skip
    if read.dropped and PartialState().is_main_process:
        left_out = ", ".join(f"{count:,} without {names[column]}" for column, count in read.dropped.items())
        print(f"{text.data}: {len(read.rows):,} of {read.read:,} rows, left out are {left_out}", file=sys.stderr)
    data = read.rows
    if text.limit is not None:
        data = data.select(range(min(text.limit, len(data))))
    return [{names[column]: row[column] for column in names if column in row} for row in data]


def arguments_parser() -> Parser:
    groups = (TextOptions, SampleOptions)
    parser = Parser(*groups, prog="smoothie-kernels sample", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("checkpoint", type=not_empty, metavar="CHECKPOINT", help="folder, or Hugging Face name")
    parser.add_argument("output", metavar="OUTPUT", help="file of JSON lines, or -")
    return parser


def command(arguments: list[str]) -> int:
    """`smoothie-kernels sample`: an error is one line on stderr; exit status 2 where options are wrong, 1 later."""
    parser = arguments_parser()
    try:
        text, options, rest = parser.read(arguments)
        with named("sources", "source"), named("templates", "template"), named("prefixes", "prefix"):
            total = sample(rest.checkpoint, rest.output, text, options)
    except (OSError, TypeError, ValueError) as error:
        print(f"smoothie-kernels sample: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, TypeError | ValueError) else 1
    if rest.output != "-" and PartialState().is_main_process:
        print(f"sampled: {rest.output}, {total:,} texts")
    return 0
