"""Metrics of generated texts, over lists of strings: METRICS has their names, what each needs, and its package.

`texts` holds one text per sample, which may be empty; `references` one list of reference texts per sample, at least
one in each; `sources` one text per sample. Packages and models are read when a metric is asked for, and models only
from this machine: nothing is downloaded. What does not fit raises ValueError.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

References = Sequence[Sequence[str]]
ORDERS = range(1, 5)  # of the n-grams of SARI and distinct-n
BATCH = 8  # texts of about the same length whose logits are in memory at once


def bleu(texts: Sequence[str], references: References, *, lowercase: bool = False) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100: 13a tokens, exponential smoothing, any number of references per text."""
    _check(texts, references)
    return float(_sacrebleu("bleu", references, lowercase).corpus_score(texts, None).score)


def chrf(texts: Sequence[str], references: References, *, lowercase: bool = False) -> float:
    """Corpus chrF of sacrebleu, 0 to 100: F2 of character 6-grams; of several references the best."""
    _check(texts, references)
    return float(_sacrebleu("chrf", references, lowercase).corpus_score(texts, None).score)


def signature(name: str, references: References, *, lowercase: bool = False) -> str:
    """What sacrebleu says of how "bleu" or "chrf" is computed."""
    return str(_sacrebleu(name, references, lowercase).get_signature())


def _sacrebleu(name: str, references: References, lowercase: bool) -> Any:
    most = max(map(len, references))
    # Its lists go the other way: all first references, all second ones; None where there is none.
    lists = [[row[index] if index < len(row) else None for row in references] for index in range(most)]
    return getattr(import_module("sacrebleu.metrics"), name.upper())(lowercase=lowercase, references=lists)


def rouge(texts: Sequence[str], references: References) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, of rouge_score: stemmed, mean over texts of the best reference.

    Words are runs of a-z and 0-9 there: it is of no use for texts in other letters.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check(texts, references)
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    rows = [scorer.score_multi(row, text) for text, row in zip(texts, references, strict=True)]
    return {kind: math.fsum(float(row[kind].fmeasure) for row in rows) / len(rows) for kind in kinds}


def sari(texts: Sequence[str], references: References, sources: Sequence[str]) -> float:
    """SARI (Xu et al. 2016), 0 to 100, by the convention of Hugging Face `evaluate`.

    The mean over texts and orders 1 to 4 of (F1 of kept + precision of deleted + F1 of added n-grams) / 3, on lower
    case 13a tokens. 0/0 is 1, and the recall of kept n-grams is over their sum of counts: both unlike Xu's own script.
    EASSE differs from both, by points: it sums counts over the corpus and takes F1 of deleted n-grams too.
    """
    _check(texts, references, sources)
    tokens = import_module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()

    # By single spaces, so that an empty text is one empty token: it can be wrong, where no token could not.
    def split(text: str) -> list[str]:
        return list(tokens(text.lower()).split(" "))

    total = 0.0
    for text, row, source in zip(texts, references, sources, strict=True):
        words = split(source), split(text), [split(reference) for reference in row]
        total += sum(_sari(*words, order) for order in ORDERS) / len(ORDERS)
    return 100 * total / len(texts)


def _sari(source: list[str], text: list[str], references: list[list[str]], order: int) -> float:
    wanted = Counter(gram for reference in references for gram in _grams(reference, order))
    # One source and one text count as often as there are references.
    before = Counter({gram: count * len(references) for gram, count in Counter(_grams(source, order)).items()})
    after = Counter({gram: count * len(references) for gram, count in Counter(_grams(text, order)).items()})

    kept, to_keep = before & after, before & wanted
    well_kept = kept & wanted
    keep = _f1(_mean_share(well_kept, kept), _share(well_kept.total(), to_keep.total()))
    deleted = before - after
    delete = _mean_share(deleted - wanted, deleted)
    added, to_add = after.keys() - before.keys(), wanted.keys() - before.keys()
    add = _f1(_share(len(added & to_add), len(added)), _share(len(added & to_add), len(to_add)))
    return (keep + delete + add) / 3


def _grams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + order]) for start in range(len(words) - order + 1)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _mean_share(part: Counter[tuple[str, ...]], whole: Counter[tuple[str, ...]]) -> float:
    """Mean over the n-grams of `whole`, each of which counts the same."""
    return _share(math.fsum(part[gram] / count for gram, count in whole.items()), len(whole))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def distinct(texts: Sequence[str]) -> dict[str, float]:
    """Distinct n-grams over all n-grams of all texts together, n = 1 to 4, 0 to 1; 0 where there is none.

    Of words between white space, case kept, none across texts. It falls with the number of texts: hold only equally
    many against each other.
    """
    _check(texts)
    rows = [text.split() for text in texts]
    shares = {}
    for order in ORDERS:
        grams = [gram for words in rows for gram in _grams(words, order)]
        shares[f"distinct{order}"] = len(set(grams)) / len(grams) if grams else 0.0
    return shares


def perplexity(texts: Sequence[str], model: str | Path) -> float:
    """exp of the mean negative log-likelihood per token, of all tokens of all texts together, under a causal model.

    What counts is every token of a text, the first predicted from the BOS token; where tokenizer and model have none,
    the first token of each text is only context. No end token is added or counted, and of a text that is longer than
    the model's context only as much as fits. NaN where no token counts. Float32 throughout.

    Args:
        texts: the texts.
        model: a folder, or the name of a model that was downloaded before.
    """
    _check(texts)
    tokenizer, network = _causal_model(str(model))
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else network.config.bos_token_id
    longest = getattr(network.config, "max_position_embeddings", None)
    prefix = [] if begin is None else [begin]
    rows = [
        (prefix + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:longest] for text in texts
    ]
    rows = sorted((row for row in rows if len(row) > 1), key=len)
    total = math.fsum(_surprise(network, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH))
    count = sum(len(row) - 1 for row in rows)
    return math.exp(total / count) if count else math.nan


@torch.inference_mode()
def _surprise(network: Any, rows: list[list[int]]) -> float:
    """Sum of the negative log-likelihood of all tokens but the first of each row."""
    tokens = pad_sequence([torch.tensor(row, device="cpu") for row in rows], batch_first=True).to(
        network.device
    )  # (B, L)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long, device="cpu") for row in rows], batch_first=True).to(
        network.device
    )
    logits = network(input_ids=tokens, attention_mask=mask).logits  # (B, L, V)
    total = 0.0
    for index, row in enumerate(rows):  # one by one: log-softmax takes as much memory again
        predicted, token = logits[index, : len(row) - 1].float(), tokens[index, 1 : len(row)]
        total += float(functional.cross_entropy(predicted, token, reduction="sum"))
    return total


@lru_cache(maxsize=1)
def _causal_model(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        network = AutoModelForCausalLM.from_pretrained(name, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"perplexity_model must be a causal model on this machine, got {name!r}: {error}") from error
    return tokenizer, network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def bertscore(texts: Sequence[str], references: References, model: str | Path, *, layers: int | None = None) -> float:
    """F1 of BERTScore, mean over texts of the best reference, as bert_score gives it: no idf, not rescaled.

    Args:
        texts, references: as everywhere; what is empty scores 0.
        model: folder of the encoder.
        layers: which layer's output is compared; by default what bert_score takes for a model of the folder's name.
    """
    _check(texts, references)
    scorer = _bert_scorer(_folder("bertscore_model", model), layers)
    rows = [[reference for reference in row if reference.strip()] for row in references]
    pairs = [(text, row) for text, row in zip(texts, rows, strict=True) if text.strip() and row]
    if not pairs:
        return 0.0
    _, _, f1 = scorer.score([text for text, _ in pairs], [row for _, row in pairs])
    return float(f1.double().sum()) / len(texts)


@lru_cache(maxsize=1)
def _bert_scorer(folder: str, layers: int | None) -> Any:
    from bert_score import BERTScorer
    from bert_score.utils import model2layers

    known = {name.rpartition("/")[2]: count for name, count in model2layers.items()}
    layers = known.get(Path(folder).resolve().name) if layers is None else layers
    if layers is None:
        raise ValueError(f"bertscore_layers must be given for a model that bert_score does not know, got {folder!r}")
    scorer = BERTScorer(model_type=folder, num_layers=layers)
    if scorer._tokenizer.model_max_length > 2**31:  # no limit, as DeBERTa's, which bert_score cannot take
        scorer._tokenizer.model_max_length = 512
    return scorer


def mauve(texts: Sequence[str], references: References, model: str | Path) -> float:
    """MAUVE of the texts against the first reference of each, 0 to 1, with mauve-text's defaults.

    It is of use from some thousand texts on. An empty text counts as a lone end token: left out, as the package does
    it, a model that says nothing would look better.

    Args:
        texts, references: as everywhere.
        model: folder of the model whose last hidden state is compared; "gpt2" or "bert" has to be in its path.
    """
    _check(texts, references)
    from mauve import compute_mauve
    from transformers import AutoTokenizer

    folder = _folder("mauve_model", model)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    end = tokenizer.eos_token or tokenizer.sep_token
    human = [row[0] if row[0].strip() else end for row in references]
    generated = [text if text.strip() else end for text in texts]
    return float(compute_mauve(p_text=human, q_text=generated, featurize_model_name=folder, device_id=0).mauve)


def _folder(name: str, model: str | Path) -> str:
    if not Path(model).is_dir():
        raise ValueError(f"{name} must be a folder, got {str(model)!r}")
    return str(model)


def _check(texts: Sequence[str], *columns: Sequence[Any]) -> None:
    """The columns are references, then sources."""
    if not texts:
        raise ValueError("texts must be at least one, got none")
    for name, column in zip(("references", "sources"), columns, strict=False):
        if len(column) != len(texts):
            raise ValueError(f"{name} must be as many as texts, {len(texts)}, got {len(column)}")
    if columns and any(isinstance(row, str) or not row for row in columns[0]):
        raise ValueError("references must be a list of at least one string for each text, got another")


class Metric(NamedTuple):
    compute: Callable[..., float | Mapping[str, float]]  # called with texts, and by keyword with what it needs
    needs: tuple[str, ...]  # of "references", "sources" and "model"
    package: str | None = None  # to import; None: nothing but this package
    options: tuple[str, ...] = ()  # further keywords


METRICS = {
    "bleu": Metric(bleu, ("references",), "sacrebleu", ("lowercase",)),
    "chrf": Metric(chrf, ("references",), "sacrebleu", ("lowercase",)),
    "rouge": Metric(rouge, ("references",), "rouge_score"),
    "sari": Metric(sari, ("references", "sources"), "sacrebleu"),
    "distinct": Metric(distinct, ()),
    "perplexity": Metric(perplexity, ("model",), "transformers"),
    "bertscore": Metric(bertscore, ("references", "model"), "bert_score", ("layers",)),
    "mauve": Metric(mauve, ("references", "model"), "mauve"),
}
INSTALL = {
    "transformers": "'.[train]' in a clone of smoothie-kernels",
    "bert_score": "bert_score",
    "mauve": "mauve-text",
}


def missing(name: str) -> str | None:
    """What has to be installed for a metric; None: nothing."""
    package = METRICS[name].package
    try:
        import_module(package or __name__)
    except ImportError as error:
        install = INSTALL.get(str(package), "'.[evaluate]' in a clone of smoothie-kernels")
        return f"it needs the package {error.name or package}: pip install {install}"
    return None


def package_version(package: str) -> str:
    try:
        return version({"mauve": "mauve-text"}.get(package, package))
    except PackageNotFoundError:
        return "unknown"  # it was not installed as a package
