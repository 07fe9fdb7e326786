"""Text to batches: rows of a sample, of files or of the hub, as token ids, in an order that only the seed decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.compute
from datasets import Dataset, DatasetDict, Features, Value, config, load_dataset
from datasets.exceptions import DatasetGenerationError

from smoothie_kernels.diffusion.batches import check_positive
from smoothie_kernels.diffusion.files import named
from smoothie_kernels.diffusion.reading import PACKED, READERS, ending, read_rows
from smoothie_kernels.diffusion.tokens import begin_tokens, end_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = Path(__file__).parent / "samples"
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
READ = 1  # to be raised where reading gives other rows: `datasets` caches them
LOOKED_AT = 1_000  # rows of a file, for the names of its columns
# Usual names of columns, the likelier first; case does not count.
SOURCES = (
    "source", "src", "input", "document", "article", "dialogue", "context", "complex", "normal", "original",
    "question1", "sentence1",
)  # fmt: skip
TARGETS = (
    "target", "trg", "tgt", "output", "summary", "highlights", "question", "simple", "simplification", "paraphrase",
    "question2", "sentence2",
)  # fmt: skip
TEXTS = ("text", "sentence", "story", "content", *TARGETS)


class Text(NamedTuple):
    """A split as `read_text` gives it."""

    rows: Dataset  # "target" and, unless unconditional, "source": strings with more than white space
    columns: dict[str, str]  # the columns of the data that these are
    read: int  # rows before some were dropped
    dropped: dict[str, int]  # rows without text, by the first column that has none


class Counts(NamedTuple):
    """What `tokenize` has seen in a column."""

    tokens: int
    cut: int  # texts that were longer
    unknown: int  # tokens of text: GPT-2's unknown token is its end token too
    ended: int  # texts in which an end or padding token stands before the end
    special: list[int]  # the special tokens that occur


def load_text(data: str, split: str, **choices: Any) -> Dataset:
    """The rows of `read_text`, which has the arguments."""
    return read_text(data, split, **choices).rows


def read_text(
    data: str,
    split: str,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    unconditional: bool = False,
) -> Text:
    """Rows of text: a column "target" and, unless unconditional, "source".

    Args:
        data: the name of a sample (`samples/README.md`); a folder with `{split}.jsonl`, .json, .csv (also .gz),
            .parquet or `{split}-*.parquet`; one such file, which is the split "train"; or a data set on the Hugging
            Face hub, `name` or `name:config`.
        split: of which; for "validation" a folder or a data set may also say "valid", "val" or "dev".
        source_column, target_column: where the usual names are not used. Dots reach into dictionaries, such as
            `translation.de`.
        unconditional: whether there is no source.

    Raises:
        ValueError: no such data, split or column; a file that is wrong, by its line; a column that does not hold
            strings; no row with text.
        OSError: the cache of `datasets` cannot be written.
    """
    if unconditional and source_column is not None:
        raise ValueError(f"source_column must be None where there is no source, got {source_column!r}")
    if source_column is not None and source_column == target_column:
        raise ValueError(f"source_column and target_column must differ, got {source_column!r} for both")

    def chosen(names: Sequence[str]) -> dict[str, str]:
        return _columns(names, source_column, target_column, unconditional, data)

    folder = _local(data)
    found = _from_hub(data, split, chosen) if folder is None else _from_files(data, _files(folder, split), chosen)
    if found is None:
        there = [known for known in SPLITS if has_split(data, known)]
        raise ValueError(f"data must have a split {split!r}, got {data!r} with {_listed(there)}")
    rows, columns = found
    kept, dropped = _with_text(rows)
    if not len(kept):
        raise ValueError(f"split {split!r} of {data!r} must have rows with text, got {len(rows)} without")
    return Text(kept, columns, len(rows), dropped)


def has_split(data: str, split: str) -> bool:
    """Whether `load_text` finds the split.

    Raises:
        ValueError: no such data.
    """
    folder = _local(data)
    if folder is None:
        return _hub_split(_hub(data), split) is not None
    return bool(_files(folder, split))


def tokenize(
    text: Dataset, tokenizer: PreTrainedTokenizerBase, *, target_length: int, source_length: int
) -> tuple[Dataset, dict[str, Counts]]:
    """Token ids of `load_text`'s rows, lists "target" and, where there is one, "source"; and what they have lost.

    They begin as the tokenizer begins them, end with its `end_token`, and are no longer than their length: what is cut
    is text before the end token.

    Raises:
        ValueError: no end token; a length below 1.
    """
    lengths = {"target": target_length, "source": source_length}
    for column in text.column_names:
        check_positive(f"{column}_length", lengths[column])
    end, unknown, special = end_token(tokenizer), tokenizer.unk_token_id, frozenset(tokenizer.all_special_ids)
    ends = {token for token in (end, tokenizer.pad_token_id) if token is not None}
    begun = len(begin_tokens(tokenizer))

    # Inside, so that `datasets` sees its code: what a module's function has made is taken from the cache for ever.
    # It counts as it goes: the counts are in the cache too, and the text is read once.
    def encode(batch: Mapping[str, list[str]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {}
        for column, texts in batch.items():
            rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
            whole = [ids if ids and ids[-1] == end else [*ids, end] for ids in rows]
            cut = [[*ids[: lengths[column] - 1], end] for ids in (ids[:-1] for ids in whole)]
            columns[column] = cut
            columns[f"{column} cut"] = [len(ids) > lengths[column] for ids in whole]
            columns[f"{column} unknown"] = [ids[begun:-1].count(unknown) for ids in cut]
            columns[f"{column} ended"] = [not ends.isdisjoint(ids[begun:-1]) for ids in cut]
            columns[f"{column} special"] = [sorted(special.intersection(ids)) for ids in cut]
        return columns

    with named(Path(config.HF_DATASETS_CACHE)):
        rows = text.map(encode, batched=True, remove_columns=text.column_names, desc="tokens")
    return rows.select_columns(text.column_names), {column: _counts(rows, column) for column in text.column_names}


def _counts(rows: Dataset, column: str) -> Counts:
    table = rows.with_format("arrow")[:]  # mapped, not read
    of_rows = [pyarrow.compute.list_value_length(table[column])]
    of_rows += [table[f"{column} {what}"] for what in ("cut", "unknown", "ended")]
    tokens, cut, unknown, ended = (pyarrow.compute.sum(values).as_py() for values in of_rows)
    special = pyarrow.compute.unique(pyarrow.compute.list_flatten(table[f"{column} special"]))
    return Counts(tokens, cut, unknown, ended, sorted(special.to_pylist()))


def _from_files(
    data: str, files: list[Path], chosen: Callable[[Sequence[str]], dict[str, str]]
) -> tuple[Dataset, dict[str, str]] | None:
    """The chosen columns of all rows, and the names that they had; None where there are no files."""
    if not files:
        return None
    first = islice(chain.from_iterable(map(read_rows, files)), LOOKED_AT)
    names = list(dict.fromkeys(name for _, row in first for name in row))
    if not names:
        raise ValueError(f"data must have rows with text, got none in {_listed(list(map(str, files)))}")
    columns = chosen(names)

    def rows(read: int, files: tuple[tuple[Any, ...], ...], columns: dict[str, str]) -> Iterator[dict[str, Any]]:
        for path, *_ in files:
            for where, row in read_rows(Path(path)):
                yield {name: _string(row.get(column), column, where) for name, column in columns.items()}

    known = tuple((str(path), str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    features = Features(dict.fromkeys(columns, Value("string")))
    given = {"read": READ, "files": known, "columns": columns}
    with named(Path(config.HF_DATASETS_CACHE)):
        try:
            return Dataset.from_generator(rows, features=features, gen_kwargs=given), columns
        except DatasetGenerationError as error:
            reason = error.__cause__ or error
            if isinstance(reason, OSError):  # the cache is not written: what is wrong with the files is a ValueError
                raise reason from error
            raise ValueError(str(reason)) from error


def _string(value: Any, column: str, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must hold strings, got {type(value).__name__} in {where}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {column!r} must hold Unicode, got {where}: {error}") from error
    return value


def _with_text(rows: Dataset) -> tuple[Dataset, dict[str, int]]:
    """Rows with text in every column, and how many others there were by the first column without."""
    table = rows.with_format("arrow")[:]
    kept, dropped = None, {}
    for column in rows.column_names:
        trimmed = pyarrow.compute.utf8_trim_whitespace(table[column])
        there = pyarrow.compute.fill_null(pyarrow.compute.not_equal(trimmed, ""), False).to_numpy()
        before = len(rows) if kept is None else int(kept.sum())
        kept = there if kept is None else kept & there
        if before > kept.sum():
            dropped[column] = before - int(kept.sum())
    return (rows.select(kept.nonzero()[0]) if dropped and kept is not None else rows), dropped


def _local(data: str) -> Path | None:
    """The sample, folder or file; None for a name on the hub."""
    path = SAMPLES / data if data in _samples() else Path(data)
    if path.is_file() and ending(path) is None:
        raise ValueError(f"data must be a file that ends in {_listed([*READERS])} or {PACKED}, got {data!r}")
    if path.exists():
        return path
    if path.is_absolute() or data.startswith((".", "~")) or ending(path) is not None:
        raise ValueError(f"data must be a folder or file that exists, got {data!r}")
    return None


def _samples() -> list[str]:
    return sorted(folder.name for folder in SAMPLES.iterdir() if folder.is_dir())


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path] if split == "train" else []
    for name in SPLITS.get(split, (split,)):
        files = [path / f"{name}{ending}{packed}" for ending in READERS for packed in ("", PACKED)]
        found = [[file] for file in files if ending(file) is not None and file.is_file()]
        found += [shards] if (shards := sorted(path.glob(f"{name}-*.parquet"))) else []
        if len(found) > 1:
            names = _listed([files[0].name for files in found])
            raise ValueError(f"data must have split {split!r} once, got {names} in {str(path)!r}")
        if found:
            return found[0]
    return []


def _from_hub(
    data: str, split: str, chosen: Callable[[Sequence[str]], dict[str, str]]
) -> tuple[Dataset, dict[str, str]] | None:
    splits = _hub(data)
    name = _hub_split(splits, split)
    if name is None:
        return None
    rows = splits[name].flatten()  # dictionaries become columns with dotted names
    columns = chosen(rows.column_names)
    for column in columns.values():
        kind = rows.features[column]
        if not (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
            got = kind.dtype if isinstance(kind, Value) else kind
            raise ValueError(f"column {column!r} of {data!r} must hold strings, got {got}")
    rows = rows.select_columns([*columns.values()])
    return rows.rename_columns({column: name for name, column in columns.items()}), columns


def _hub(data: str) -> DatasetDict:
    name, _, subset = data.partition(":")
    splits = _loaded(data, lambda: load_dataset(name, subset or None))
    first = next(iter(splits.values()))
    if first.info.builder_name != "csv":
        return splits
    # Again, as text: `datasets` looks at every block of a CSV file by itself and may take it for numbers.
    text = Features(dict.fromkeys(first.column_names, Value("string")))
    return _loaded(data, lambda: load_dataset(name, subset or None, features=text, keep_default_na=False))


def _hub_split(splits: DatasetDict, split: str) -> str | None:
    return next((name for name in SPLITS.get(split, (split,)) if name in splits), None)


def _loaded(data: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        kinds = f"a sample ({', '.join(_samples())}), a folder, a file or a data set on the Hugging Face hub"
        reason = error.__cause__ or error
        raise ValueError(f"data must be {kinds} that can be read, got {data!r}: {reason}") from error


def _columns(
    names: Sequence[str], source: str | None, target: str | None, unconditional: bool, data: str
) -> dict[str, str]:
    """Which column is the source, which the target."""
    columns = {"target": _column(names, target, TEXTS if unconditional else TARGETS, "target", data, source)}
    if not unconditional:
        columns["source"] = _column(names, source, SOURCES, "source", data, columns["target"])
    return columns


def _column(
    there: Sequence[str], given: str | None, usual: Sequence[str], name: str, data: str, taken: str | None
) -> str:
    if given is not None:
        if given not in there:
            raise ValueError(f"{name}_column must be one of the columns of {data!r}, {_listed(there)}, got {given!r}")
        return given
    by_name = {column.lower(): column for column in there if column != taken}
    for column in usual:
        if column in by_name:
            return by_name[column]
    alone = "" if usual is TEXTS else "; unconditional where there is no source"
    raise ValueError(f"{name}_column must be given for {data!r}, whose columns are {_listed(there)}{alone}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
