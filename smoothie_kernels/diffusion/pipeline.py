"""A model with its tokenizer: from texts to texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from tokenizers import decoders
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from smoothie_kernels.diffusion.batches import Collate, check_positive
from smoothie_kernels.diffusion.checkpoint import found
from smoothie_kernels.diffusion.live import FREE
from smoothie_kernels.diffusion.model import SmoothieConfig, SmoothieModel
from smoothie_kernels.diffusion.options import SampleOptions
from smoothie_kernels.diffusion.tokens import begin_tokens, end_token, pad_token

MASK = "[MASK]"
logger = logging.getLogger("smoothie_kernels")


class Generated(NamedTuple):
    """One sample."""

    id: int
    text: str
    tokens: list[int]  # up to and with the end token
    steps: int  # how often the model was called


class SmoothiePipeline:
    """Texts from a trained model.

    pipeline = SmoothiePipeline.from_pretrained("runs/questions")
    pipeline(["Copper conducts electricity better than iron."], steps=50)  # [Generated(id=0, text="...", ...)]

    Args:
        model: on its device.
        tokenizer: the one that it was trained with.
    """

    def __init__(self, model: SmoothieModel, tokenizer: Any) -> None:
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if size > model.config.vocab_size:
            rows = model.config.vocab_size
            raise ValueError(f"tokenizer must be the model's, of at most {rows} tokens, got one of {size}")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.end, self.pad = end_token(tokenizer), pad_token(tokenizer)
        # WordPiece drops spaces: transformers' rules turn "don ' t" into "don't" again. Whether they are its default
        # depends on its version. Other tokenizers keep spaces in their tokens.
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self.rejoins = isinstance(decoder, decoders.WordPiece)
        self.excluded = self.model.config.unseen_token_ids
        if self.excluded is None:  # not known: then those that no text has of itself
            known = {self.end, self.pad, tokenizer.unk_token_id, *begin_tokens(tokenizer)}
            self.excluded = sorted({*tokenizer.all_special_ids} - known)

    @classmethod
    def from_pretrained(cls, checkpoint: Path | str, *, device: torch.device | str = "cpu") -> SmoothiePipeline:
        """Of a checkpoint-N folder, of a training run's folder (its newest), or of a name on the Hugging Face hub.

        Raises:
            ValueError: no such thing, or of another kind of model.
        """
        folder = newest_checkpoint(checkpoint)
        wanted = "checkpoint must be a Smoothie model's folder, a training run's, or a name on the Hugging Face hub"
        try:
            config = AutoConfig.from_pretrained(folder)
            if not isinstance(config, SmoothieConfig):  # else all its weights would be drawn anew, and only logged
                raise ValueError(f"its model_type is {config.model_type!r}")
            model, about = SmoothieModel.from_pretrained(folder, output_loading_info=True)
            if about["missing_keys"]:
                raise ValueError(f"it has no {min(about['missing_keys'])}")
            for name, weights in model.named_parameters():
                if not weights.isfinite().all():  # of a training that diverged: every text would be empty
                    raise ValueError(f"its {name} has values that are not finite")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{wanted}, got {str(checkpoint)!r}: {error}") from error
        return cls(model.to(device), tokenizer)

    def __call__(self, sources: str | Sequence[str] | None = None, **how: Any) -> list[Generated]:
        """All samples of `stream`, which has the arguments."""
        return [generated for batch in self.stream(sources, **how) for generated in batch]

    def stream(
        self,
        sources: str | Sequence[str] | None = None,
        *,
        count: int | None = None,
        samples: int = 1,
        templates: str | Sequence[str] | None = None,
        prefixes: str | Sequence[str] | None = None,
        first_id: int = 0,
        batch_size: int = 16,
        part: tuple[int, int] = (0, 1),
        truncate: bool = False,
        progress: bool = False,
        options: SampleOptions | None = None,
        **choices: Any,
    ) -> Iterator[list[Generated]]:
        """Samples, batch by batch.

        Args:
            sources: texts, where the model has a source.
            count: how many texts, where nothing else says it.
            samples: of each. Sample k of text i has the id i * samples + k: on it and the seed alone it depends.
            templates: whole texts, one for each or one for all, in which "[MASK]" stands for every token to fill in.
            prefixes: how texts begin, likewise.
            first_id: the first sample to make: to go on where another call ended.
            batch_size: samples at once.
            part: (k, n): every n-th batch from batch k on, so that n processes share them; all n yield as many, and
                empty ones at the end.
            truncate: cut sources that are longer than the model's, as training does, instead of refusing them.
            progress: show a bar of samples, and of steps in the batch, on stderr.
            options, choices: a `SampleOptions`, or its fields by name: solver, steps, delta, guidance, seed, ...

        Raises:
            TypeError, ValueError: a bad argument, by name.
        """
        check_positive("samples", samples)
        check_positive("batch_size", batch_size)
        texts, templates = _listed("sources", sources), _listed("templates", templates)
        prefixes = _listed("prefixes", prefixes)
        if templates is not None and prefixes is not None:
            raise ValueError("prefixes must be None where there are templates, got both")
        total = _count({"sources": texts, "templates": templates, "prefixes": prefixes}, count) * samples
        config = self.model.config
        given = None if texts is None else self._sources(texts, truncate, tell=part[0] == 0)
        fixed = [self._fixed(text, whole=templates is not None) for text in templates or prefixes or ()]
        collate = Collate(self.pad, config.target_length, config.source_length)
        bar = tqdm(total=total, initial=first_id, unit="text", disable=not progress)

        def stepped(step: int, steps: int) -> None:
            bar.set_postfix(step=f"{step}/{steps}")

        rank, ranks = part
        for first in range(first_id, total, batch_size * ranks):
            start = first + rank * batch_size
            ids = range(start, min(start + batch_size, total))
            if not ids:
                yield []
                continue
            batch: dict[str, Tensor] = {}
            if given is not None:
                batch = collate([{"source": given[i // samples]} for i in ids])
            rows = [fixed[i // samples if len(fixed) > 1 else 0] for i in ids] if fixed else None
            result = self.model.generate(
                batch.get("source"), batch.get("source_mask"), sample_ids=ids,
                fixed=None if rows is None else torch.tensor(rows, dtype=torch.int64, device="cpu"),
                excluded=self.excluded, progress=stepped, options=options, **choices,
            )  # fmt: skip
            tokens = [row[:length] for row, length in zip(result.tokens.tolist(), result.lengths.tolist(), strict=True)]
            steps = result.steps.tolist()
            bar.update(min(batch_size * ranks, total - first))
            yield [Generated(i, self.decode(row), row, n) for i, row, n in zip(ids, tokens, steps, strict=True)]
        bar.close()

    def names(self, tokens: Sequence[int]) -> str:
        """Some tokens as the vocabulary has them, special ones too."""
        return " ".join(map(str, self.tokenizer.convert_ids_to_tokens(tokens)))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without special and unused ones."""
        names = self.tokenizer.convert_ids_to_tokens(tokens)
        words = [token for token, name in zip(tokens, names, strict=True) if name and not name.startswith("[unused")]
        text: str = self.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=self.rejoins)
        return text.strip()

    def _sources(self, texts: list[str], truncate: bool, *, tell: bool) -> list[list[int]]:
        """The tokens of all sources; what they lose is logged, by the first of several processes."""
        most, kept = self.model.config.source_length, []
        nothing = {self.end, self.tokenizer.unk_token_id, *begin_tokens(self.tokenizer)}
        unknown = []
        cut = 0
        for text in texts:
            ids = begin_tokens(self.tokenizer, text)
            if len(ids) >= most and not truncate:
                got = f"{len(ids) + 1}: {text[:60]!r}"
                raise ValueError(f"sources must have at most {most} tokens, or be truncated, got {got}")
            if nothing.issuperset(ids):
                unknown.append(text)
            cut += len(ids) >= most
            kept.append([*ids[: most - 1], self.end])
        if cut and tell:
            logger.warning("%d of %d sources are cut at %d tokens", cut, len(texts), most)
        if unknown and tell:
            example = f"{unknown[0][:60]!r}"
            logger.warning("%d of %d sources have no token that the model knows: %s", len(unknown), len(texts), example)
        return kept

    def _fixed(self, text: str, *, whole: bool) -> list[int]:
        """Tokens that are given, FREE elsewhere; behind a whole text there is nothing but padding."""
        begun = begin_tokens(self.tokenizer)
        for i, part in enumerate(text.split(MASK) if whole else [text]):
            # In byte-level BPE and SentencePiece the space before a word is part of its token: a gap brings its own.
            words = self.tokenizer(part.removesuffix(" "), add_special_tokens=False, verbose=False)["input_ids"]
            begun += [FREE, *words] if i else words
        ids, most = [*begun, self.end] if whole else begun, self.model.config.target_length
        if len(ids) > most:
            name = "templates" if whole else "prefixes"
            raise ValueError(f"{name} must have at most {most} tokens, got {len(ids)}: {text[:60]!r}")
        return ids + [self.pad if whole else FREE] * (most - len(ids))


def newest_checkpoint(checkpoint: Path | str) -> Path | str:
    """The newest checkpoint of a training run's folder; anything else as it is."""
    checkpoints = found(Path(checkpoint)) if Path(checkpoint).is_dir() else []
    return checkpoints[-1] if checkpoints else checkpoint


def _listed(name: str, texts: str | Sequence[str] | None) -> list[str] | None:
    if texts is None:
        return None
    listed = [texts] if isinstance(texts, str) else list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be strings, got {type(text).__name__}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # as a terminal gives what is no UTF-8
            raise ValueError(f"{name} must be Unicode, got {text[:60]!r}")
    return listed


def _count(texts: dict[str, list[str] | None], count: int | None) -> int:
    """How many texts are asked for; one template or prefix is for all."""
    numbers = {name: len(each) for name, each in texts.items() if each is not None}
    if count is not None:
        check_positive("count", count)
        numbers["count"] = count
    shared = {name: number for name, number in numbers.items() if number != 1 or name in ("sources", "count")}
    if len({*shared.values()}) > 1:
        said = ", ".join(f"{number} {name}" for name, number in shared.items())
        raise ValueError(f"{' and '.join(shared)} must be as many, got {said}")
    if not numbers:
        raise ValueError("count must be given where there are no sources, templates or prefixes, got None")
    return next(iter(shared.values()), 1)
