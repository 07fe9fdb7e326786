"""Fingerprints of what a run depends on: to tell other data, another tokenizer or another model from the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

    from smoothie_kernels.diffusion.model import SmoothieModel

ROWS = 10_000  # hashed at once; another number would give other fingerprints


def of_tokens(rows: Dataset) -> str:
    """Of lists of token ids, by column; the number of rows first, because shortened data are the likeliest change."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(ROWS):
        for name in sorted(table.column_names):
            column = table[name].combine_chunks()
            digest.update(name.encode())
            for values in (column.value_lengths(), column.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return f"{len(rows):,} rows, {digest.hexdigest()}"


def of_tokenizer(tokenizer: Any) -> str:
    """Of the ids of all tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return f"{len(vocabulary):,} tokens, {hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()}"


def of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def of_model(model: SmoothieModel, tokenizer: Any) -> str:
    """Of config, weights and tokenizer, wherever they were loaded from."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "transformers_version"}
    digest = hashlib.sha256(json.dumps([config, of_tokenizer(tokenizer)], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
