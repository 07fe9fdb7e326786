"""The embedding table of a vocabulary: read from a model or from word vectors, or drawn; normalised as in the paper."""

from __future__ import annotations

import gzip
import json
import logging
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# In order of preference: where a model shares its table, "shared" is it.
TABLE_NAMES = ("word_embeddings.weight", "shared.weight", "embed_tokens.weight", "wte.weight", "tok_embeddings.weight")
NORMALISATIONS = ("total", "feature", "none")
WORD_FILES = (".txt", ".vec", ".gz")
MARKS = ("##", "Ġ", "▁")  # with which a token of WordPiece, byte-level BPE or SentencePiece says how it joins the last
BLOCK = 4096  # lines at a time

logger = logging.getLogger("smoothie_kernels")


class Tokenizer(Protocol):
    """A tokenizer of transformers or of tokenizers, as far as it matters here."""

    def get_vocab(self) -> dict[str, int]: ...


def load_embeddings(
    source: str, tokenizer: Tokenizer | None = None, *, normalisation: str = "total", seed: int = 0
) -> Tensor:
    """The table of `source`, normalised.

    Args:
        source: where it is,

            - a model's folder or its name on the Hugging Face hub: its input embeddings, of which only that one
              tensor is read where the weights are safetensors; the cache and HF_HUB_OFFLINE are honoured,
            - `file.safetensors`, or `file.safetensors:tensor`,
            - a text file of word vectors, .txt, .vec or .gz: a word and its numbers in every line, with or without
              word2vec's first line. A token gets the vector of its word, without its mark and, where that is not
              there, in lower case; all others get normals with the mean and the deviation of the file's features,
            - `random:width`: standard normals.

        tokenizer: whose tokens the rows stand for. Word vectors and `random` need one; a model's table is checked to
            have a row for each of its tokens, and may have more.
        normalisation: as `normalise` takes it, over the `used_rows` of the tokenizer, or all of them without one.
        seed: of what is drawn.

    Returns:
        (V, D) float32.

    Raises:
        ValueError: no such table, one of another shape or for other tokens, a bad line, another normalisation.
    """
    _check_normalisation(normalisation)
    weights = re.fullmatch(r"(.+\.safetensors)(?::(.+))?", source)
    if source.partition(":")[0] == "random":
        table = _drawn(source, tokenizer, seed)
    elif weights:
        table = _from_safetensors(Path(weights[1]), weights[2])
    elif source.endswith(WORD_FILES) and not Path(source).is_dir():
        table = _from_words(source, tokenizer, seed)
    else:
        table = _from_model(source)
    used = None if tokenizer is None else used_rows(tokenizer, len(table))
    return normalise(table, normalisation, used)


def normalise(table: Tensor, how: str, used: Tensor | None = None) -> Tensor:
    """A table with mean 0 and standard deviation 1.

    Equal to, with the statistics in float64::

        std, mean = torch.std_mean(table[used])         # how = "total": of all entries together, as in the paper
        std, mean = torch.std_mean(table[used], dim=0)  # how = "feature"
        (table - mean) / std

    Args:
        table: (V, D).
        how: "total", "feature", or "none": the table as it is.
        used: (V,) bool, the rows that count; None for all.

    Raises:
        ValueError: a bad argument, by name; entries that are not finite or do not differ.
    """
    _check_normalisation(how, "how")
    if table.ndim != 2:
        raise ValueError(f"table must have shape [V, D], got {list(table.shape)}")
    if used is not None and (used.dtype != torch.bool or used.shape != table.shape[:1]):
        wanted, got = f"torch.bool of shape [{len(table)}]", f"{used.dtype} of shape {list(used.shape)}"
        raise ValueError(f"used must be {wanted}, got {got}")
    if how == "none":
        return table
    counts = (table if used is None else table[used]).double()
    if counts.numel() < 2 or (how == "feature" and len(counts) < 2):
        raise ValueError(f"table must have two used entries or more to normalise, got {len(counts)} used rows")
    std, mean = torch.std_mean(counts) if how == "total" else torch.std_mean(counts, dim=0)
    bad = ~(std.isfinite() & (std > 0))
    if bad.any():
        of = "" if how == "total" else f" in feature {int(bad.nonzero()[0])}"
        raise ValueError(
            f"table must have finite entries that differ, got a standard deviation of {float(std[bad][0])}{of}"
        )
    return table.sub(mean.to(table.dtype)).div_(std.to(table.dtype))


def used_rows(tokenizer: Tokenizer, rows: int) -> Tensor:
    """Which rows of a table are for tokens that texts may hold: (rows,) bool.

    Not those of tokens named `[unused...]`, nor rows behind or between the tokens, with which many models are padded.

    Raises:
        ValueError: a token without a row.
    """
    vocabulary = tokenizer.get_vocab()
    size = _size(vocabulary)
    if size > rows:
        raise ValueError(
            f"tokenizer must be the one of the embeddings, got the wrong vocabulary: {size:,} tokens for {rows:,} rows"
        )
    used = torch.zeros(rows, dtype=torch.bool, device="cpu")
    used[[index for token, index in vocabulary.items() if not token.startswith("[unused")]] = True
    return used


def model_file(source: str, name: str) -> Path | None:
    """A file of a model, None where there is none: of its folder, or of its name on the hub or in its cache.

    Raises:
        ValueError: no folder, and no name of a model.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if folder.is_file():
        kinds = f".safetensors or {', '.join(WORD_FILES)}"
        raise ValueError(f"source must be a model, or a file that ends in {kinds}, got the file {source!r}")
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(_no_model(source, error)) from error
    except errors.EntryNotFoundError:  # also: not in the cache, and the hub cannot be asked
        return None


def _from_model(source: str) -> Tensor:
    index = model_file(source, "model.safetensors.index.json")
    if index is None:
        weights = model_file(source, "model.safetensors")
        return _from_transformers(source) if weights is None else _from_safetensors(weights, None)
    shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    name = _table_name(shards, source)
    weights = model_file(source, shards[name])
    if weights is None:
        raise ValueError(f"source must have all files that its index names, got {source!r} without {shards[name]}")
    return _from_safetensors(weights, name)


def _from_transformers(source: str) -> Tensor:
    """For weights in other files than safetensors."""
    try:
        from transformers import AutoModel
    except ImportError as error:
        reason = "no model.safetensors can be reached, and for other weights transformers is not installed"
        raise ValueError(_no_model(source, reason)) from error
    try:
        table = AutoModel.from_pretrained(source).get_input_embeddings().weight.detach()
    except (OSError, ValueError, NotImplementedError) as error:
        raise ValueError(_no_model(source, error)) from error
    return _as_table(table, source)


def _from_safetensors(path: Path, name: str | None) -> Tensor:
    if not path.is_file():
        raise ValueError(f"source must be a file that exists, got {str(path)!r}")
    try:
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
            if name is not None and name not in names:
                raise ValueError(f"source must name one of the tensors of {path}, {_listed(names)}, got {name!r}")
            name = name or _table_name(names, str(path))
            table = tensors.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"source must be a safetensors file, got {str(path)!r}: {error}") from error
    return _as_table(table, f"{path}:{name}")


def _table_name(names: Iterable[str], source: str) -> str:
    every = list(names)
    for suffix in TABLE_NAMES:
        found = [name for name in every if name == suffix or name.endswith("." + suffix)]
        if len(found) == 1:
            return found[0]
        if found:
            choice = "name one as file.safetensors:tensor"
            raise ValueError(f"source must have one embedding table, got {_listed(found)} in {source!r}; {choice}")
    if len(every) == 1:
        return every[0]
    wanted = f"a tensor named like an embedding table ({', '.join(TABLE_NAMES)})"
    raise ValueError(f"source must have {wanted} or a single one, got {_listed(every)} in {source!r}")


def _as_table(tensor: Tensor, where: str) -> Tensor:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        got = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"source must have a floating-point table of shape [V, D], got {got} in {where}")
    return tensor.to(torch.float32, copy=True)  # not a view of the file


def _drawn(source: str, tokenizer: Tokenizer | None, seed: int) -> Tensor:
    width = source.partition(":")[2]
    if not (width.isdecimal() and int(width)):
        raise ValueError(f"source must be 'random:width' with a positive width, got {source!r}")
    return _normals(_size(_tokens(source, tokenizer)), int(width), seed)


def _from_words(source: str, tokenizer: Tokenizer | None, seed: int) -> Tensor:
    vocabulary = _tokens(source, tokenizer)
    if not Path(source).is_file():
        raise ValueError(f"source must be a file that exists, got {source!r}")
    words = {token: _word(token) for token in vocabulary}
    vectors, mean, std = _read_words(Path(source), {*words.values(), *(word.lower() for word in words.values())})
    table = _normals(_size(vocabulary), len(mean), seed) * std + mean
    found = {
        vocabulary[token]: vectors[key]
        for token, word in words.items()
        if (key := word if word in vectors else word.lower()) in vectors
    }
    if not found:
        raise ValueError(
            f"source must have vectors of the tokenizer's words, got none for {len(words):,} tokens in {source!r}"
        )
    table[list(found)] = torch.stack(list(found.values()))
    logger.info("%s has vectors for %s of %s tokens", source, f"{len(found):,}", f"{len(words):,}")
    return table


def _word(token: str) -> str:
    for mark in MARKS:
        token = token.removeprefix(mark)
    return token.removesuffix("</w>")


def _read_words(path: Path, wanted: set[str]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The vectors of wanted words, and the mean and standard deviation of every feature over all words."""
    vectors: dict[str, Tensor] = {}
    count, total, squares = 0, *torch.zeros(2, 1, dtype=torch.float64, device="cpu")
    lines = _read_lines(path)
    while block := list(islice(lines, BLOCK)):
        for word, numbers in block:
            if word in wanted and word not in vectors:
                vectors[word] = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        values = torch.tensor([numbers for _, numbers in block], dtype=torch.float64, device="cpu")
        count, total, squares = count + len(block), total + values.sum(0), squares + values.square().sum(0)
    if not count:
        raise ValueError(f"source must have lines of a word and its numbers, got none in {str(path)!r}")
    mean = total / count
    return vectors, mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()


def _read_lines(path: Path) -> Iterator[tuple[str, list[float]]]:
    width = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                line = line.rstrip()
                if not line:
                    continue
                if not width:
                    fields = line.split()
                    header = len(fields) == 2 and all(field.isdecimal() for field in fields)
                    width = int(fields[1]) if header else max(len(fields) - 1, 1)
                    if header:
                        continue
                # From the right and at one separator: some files have words with a space, or that are a wider one.
                word, *numbers = line.rsplit("\t" if "\t" in line else " ", width)
                yield word, _numbers(numbers, width, f"line {number} of {path}: {line[:60]!r}")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"source must be a file of words and numbers, got {str(path)!r}: {error}") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="\n")
    return open(path, encoding="utf-8", errors="replace", newline="\n")


def _numbers(fields: list[str], width: int, where: str) -> list[float]:
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        numbers = []
    if len(numbers) != width or not all(map(math.isfinite, numbers)):
        raise ValueError(f"source must have a word and {width} finite numbers in every line, got {where}")
    return numbers


def _tokens(source: str, tokenizer: Tokenizer | None) -> dict[str, int]:
    if tokenizer is None:
        raise ValueError(f"tokenizer must be given for source {source!r}, got None")
    return tokenizer.get_vocab()


def _size(vocabulary: dict[str, int]) -> int:
    return 1 + max(vocabulary.values(), default=-1)


def _normals(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float32, device="cpu")


def _no_model(source: str, reason: object) -> str:
    return f"source must be a model's folder or name on the Hugging Face hub, or a file, got {source!r}: {reason}"


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_normalisation(how: str, name: str = "normalisation") -> None:
    if how not in NORMALISATIONS:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, NORMALISATIONS))}, got {how!r}")
