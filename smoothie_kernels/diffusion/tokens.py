"""Tokenizers: which tokens begin, end and fill texts, what becomes of letters, and whether a table is for them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from smoothie_kernels.diffusion.embeddings import WORD_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, option: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Raises ValueError: no such tokenizer, or a damaged one."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what the libraries below raise of a damaged file may be anything
        raise ValueError(f"{option} must be a Hugging Face name or a folder, got {name!r}: {error}") from error


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


def begin_tokens(tokenizer: PreTrainedTokenizerBase, text: str = "") -> list[int]:
    """A text's tokens as the tokenizer begins them, without its end token."""
    ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == end_token(tokenizer) else ids


def check_tokens(tokenizer: PreTrainedTokenizerBase, embeddings: str) -> str | None:
    """Whether a table's rows are those of a tokenizer's tokens: None, or what cannot be known.

    A model's table is for its own tokenizer. Tokens may have been added, and may stand where it has `[unused...]`
    or special ones.

    Args:
        embeddings: as `load_embeddings` takes them.

    Raises:
        ValueError: the table's own tokenizer has other tokens.
    """
    weights = re.fullmatch(r"(.+\.safetensors)(?::.+)?", embeddings)
    if embeddings.partition(":")[0] == "random" or (embeddings.endswith(WORD_FILES) and not Path(embeddings).is_dir()):
        return None  # drawn for the tokens, or found by their words
    source = str(Path(weights[1]).parent) if weights else embeddings
    try:
        own = load_tokenizer(source).get_vocab()
    except ValueError:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        some = ", ".join(f"{index} {token!r}" for token, index in vocabulary[:: max(1, len(vocabulary) // 4)][:4])
        return f"{embeddings} has no tokenizer of its own: its rows are taken for these tokens: {some}, ..."
    theirs = {index: token for token, index in own.items() if not token.startswith("[unused")}
    special = {*tokenizer.all_special_tokens}
    wrong = {
        token: index
        for token, index in tokenizer.get_vocab().items()
        if index in theirs and theirs[index] != token and token not in special
    }
    if wrong:
        token, index = min(wrong.items(), key=lambda item: item[1])
        example = f"{index} is {token!r}, and {theirs[index]!r} in {source}"
        count = f"{len(wrong):,} of {len(tokenizer.get_vocab()):,} tokens with other ids"
        raise ValueError(f"tokenizer must be the one of the embeddings, got {count}: {example}")
    return None


def surviving(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether capital letters and accents are there after tokenising."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        accented, small, plain = (tokenizer(letter)["input_ids"] for letter in ("É", "é", "E"))
        return accented != small, accented != plain
    left = "É" if backend.normalizer is None else backend.normalizer.normalize_str("É")
    return left.lower() != left, any(map(unicodedata.combining, unicodedata.normalize("NFD", left)))
