"""Text to batches: rows of a sample, of files or of the hub, as token ids, in an order that only the seed decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from smoothie_kernels.diffusion.batches import check_positive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = Path(__file__).parent / "samples"
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
READERS: dict[str, tuple[str, dict[str, Any]]] = {  # ending: name and options of the builder in `datasets`
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # "NA" and "null" are words
}
PACKED = ".gz"
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

logger = logging.getLogger("smoothie_kernels")


def load_text(
    data: str,
    split: str,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    unconditional: bool = False,
) -> Dataset:
    """Rows of text: a column "target" and, unless unconditional, "source".

    Args:
        data: the name of a sample (`samples/README.md`); a folder with `{split}.jsonl`, .json, .csv (also .gz),
            .parquet or `{split}-*.parquet`; one such file, which is the split "train"; or a data set on the Hugging
            Face hub, `name` or `name:config`.
        split: of which; for "validation" a folder or a data set may also say "valid", "val" or "dev".
        source_column, target_column: where the usual names are not used. Dots reach into dictionaries, such as
            `translation.de`.
        unconditional: whether there is no source.

    Returns:
        Rows whose texts are not empty; how many were dropped is logged.

    Raises:
        ValueError: no such data, split or column; a column that does not hold strings; no row with text.
    """
    if unconditional and source_column is not None:
        raise ValueError(f"source_column must be None where there is no source, got {source_column!r}")
    if source_column is not None and source_column == target_column:
        raise ValueError(f"source_column and target_column must differ, got {source_column!r} for both")
    rows = _read(data, split)
    if rows is None:
        found = [known for known in SPLITS if has_split(data, known)]
        raise ValueError(f"data must have a split {split!r}, got {data!r} with {_listed(found)}")
    rows = rows.flatten()  # dictionaries become columns with dotted names
    columns = _columns(rows, source_column, target_column, unconditional, data)
    for column in columns.values():
        kind = rows.features[column]
        if not (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
            got = kind.dtype if isinstance(kind, Value) else kind
            raise ValueError(f"column {column!r} of {data!r} must hold strings, got {got}")
    rows = rows.select_columns([*columns.values()]).rename_columns({column: name for name, column in columns.items()})
    kept = rows.filter(lambda row: all(text is not None and text.strip() for text in row.values()))
    if not len(kept):
        raise ValueError(f"split {split!r} of {data!r} must have rows with text, got {len(rows)} without")
    if len(kept) == len(rows):
        return rows
    logger.info("%s, %s: %d of %d rows are dropped, their text is empty", data, split, len(rows) - len(kept), len(rows))
    return kept


def has_split(data: str, split: str) -> bool:
    """Whether `load_text` finds the split.

    Raises:
        ValueError: no such data.
    """
    folder = _local(data)
    if folder is None:
        return _hub_split(_from_hub(data), split) is not None
    return bool(_files(folder, split))


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text: the one with which the tokenizer ends it, or else its end or separator token.

    Raises:
        ValueError: it has neither.
    """
    ends = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]
    if not ends:
        raise ValueError(f"tokenizer must have an end or separator token, got {type(tokenizer).__name__} without")
    added = tokenizer("")["input_ids"]
    return int(added[-1] if added and added[-1] in ends else ends[0])


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token behind the end of a text, which is the end token where there is none for it.

    Raises:
        ValueError: it has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(f"tokenizer must have a padding or end token, got {type(tokenizer).__name__} without")


def tokenize(text: Dataset, tokenizer: PreTrainedTokenizerBase, *, target_length: int, source_length: int) -> Dataset:
    """Token ids of `load_text`'s rows: lists "target" and, where there is one, "source".

    They begin as the tokenizer begins them, end with its `end_token`, and are no longer than their length: what is cut
    is text before the end token.

    Raises:
        ValueError: no end token; a length below 1.
    """
    lengths = {"target": target_length, "source": source_length}
    for column in text.column_names:
        check_positive(f"{column}_length", lengths[column])
    end = end_token(tokenizer)

    # Inside, so that `datasets` sees its code: what a module's function has made is taken from the cache for ever.
    def encode(batch: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        columns: dict[str, list[list[int]]] = {}
        for column, texts in batch.items():
            rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
            endless = [ids[:-1] if ids and ids[-1] == end else ids for ids in rows]
            columns[column] = [[*ids[: lengths[column] - 1], end] for ids in endless]
        return columns

    return text.map(encode, batched=True, remove_columns=text.column_names, desc="tokens")


def _read(data: str, split: str) -> Dataset | None:
    """All columns of a split; None where there is no such split."""
    folder = _local(data)
    if folder is None:
        splits = _from_hub(data)
        name = _hub_split(splits, split)
        return None if name is None else splits[name]
    files = _files(folder, split)
    if not files:
        return None
    reader, options = READERS[_ending(files[0]) or ""]
    return _loaded(data, lambda: load_dataset(reader, data_files=[*map(str, files)], split="train", **options))


def _local(data: str) -> Path | None:
    """The sample, folder or file; None for a name on the hub."""
    path = SAMPLES / data if data in _samples() else Path(data)
    if path.is_file() and _ending(path) is None:
        raise ValueError(f"data must be a file that ends in {_listed([*READERS])} or {PACKED}, got {data!r}")
    if path.exists():
        return path
    if path.is_absolute() or data.startswith((".", "~")) or _ending(path) is not None:
        raise ValueError(f"data must be a folder or file that exists, got {data!r}")
    return None


def _samples() -> list[str]:
    return sorted(folder.name for folder in SAMPLES.iterdir() if folder.is_dir())


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path] if split == "train" else []
    for name in SPLITS.get(split, (split,)):
        files = [path / f"{name}{ending}{packed}" for ending in READERS for packed in ("", PACKED)]
        found = [[file] for file in files if _ending(file) is not None and file.is_file()]
        found += [shards] if (shards := sorted(path.glob(f"{name}-*.parquet"))) else []
        if len(found) > 1:
            names = _listed([files[0].name for files in found])
            raise ValueError(f"data must have split {split!r} once, got {names} in {str(path)!r}")
        if found:
            return found[0]
    return []


def _ending(path: Path) -> str | None:
    """The key of READERS; None for another file."""
    packed = path.suffix == PACKED
    ending = path.with_suffix("").suffix if packed else path.suffix
    return ending if ending in READERS and not (packed and ending == ".parquet") else None


def _from_hub(data: str) -> DatasetDict:
    name, _, config = data.partition(":")
    return _loaded(data, lambda: load_dataset(name, config or None))


def _hub_split(splits: DatasetDict, split: str) -> str | None:
    return next((name for name in SPLITS.get(split, (split,)) if name in splits), None)


def _loaded(data: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        kinds = f"a sample ({', '.join(_samples())}), a folder, a file or a data set on the Hugging Face hub"
        reason = error.__cause__ or error
        raise ValueError(f"data must be {kinds} that can be read, got {data!r}: {reason}") from error


def _columns(rows: Dataset, source: str | None, target: str | None, unconditional: bool, data: str) -> dict[str, str]:
    """Which column is the source, which the target."""
    columns = {"target": _column(rows, target, TEXTS if unconditional else TARGETS, "target", data, source)}
    if not unconditional:
        columns["source"] = _column(rows, source, SOURCES, "source", data, columns["target"])
    return columns


def _column(rows: Dataset, given: str | None, usual: Sequence[str], name: str, data: str, taken: str | None) -> str:
    there: list[str] = rows.column_names
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
