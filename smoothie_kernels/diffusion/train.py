"""From options to a trained model: what `smoothie-kernels train` does."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.hf_argparser import string_to_bool

from smoothie_kernels.diffusion import fingerprints, ranks, summary
from smoothie_kernels.diffusion.batches import Collate
from smoothie_kernels.diffusion.checkpoint import Resume, start
from smoothie_kernels.diffusion.data import has_split, read_text, tokenize
from smoothie_kernels.diffusion.embeddings import load_embeddings
from smoothie_kernels.diffusion.files import locked
from smoothie_kernels.diffusion.flags import Parser, named, not_empty
from smoothie_kernels.diffusion.loss import TrainingLoss
from smoothie_kernels.diffusion.model import SmoothieConfig, SmoothieModel
from smoothie_kernels.diffusion.options import DataOptions, LossOptions, ModelOptions, RunOptions, as_record
from smoothie_kernels.diffusion.surroundings import check_surroundings
from smoothie_kernels.diffusion.tokens import check_tokens, end_token, load_tokenizer, pad_token
from smoothie_kernels.diffusion.trainer import Texts, Trainer

USAGE = "smoothie-kernels train OUTPUT --data DATA [options]"
DESCRIPTION = """\
Train a Smoothie model on text. OUTPUT gets checkpoint-N folders, which SmoothieModel.from_pretrained reads, and
metrics.csv and validation.csv. Without options the model and the training are the paper's, for large GPUs.
"""
EPILOG = """\
A small model, for a CPU:

  smoothie-kernels train runs/questions --data question-generation \\
      --embeddings sentence-transformers/all-MiniLM-L6-v2 --layers 4 --condition-layers 2 --self-condition-layers 1 \\
      --source-length 64 --target-length 32 --batch-size 32 --learning-rate 5e-4 --warmup-steps 200 --ema 0.999 \\
      --steps 2000

More steps later: the same with a larger --steps, and --resume. With --resume auto one command begins and goes on, as
jobs that are killed and started again need it; SIGTERM saves a checkpoint first. Several processes, the same run:

  torchrun --nproc-per-node 2 -m smoothie_kernels.cli train runs/questions ...
"""


def train(
    output: Path | str, data: DataOptions, model: ModelOptions, loss: LossOptions, run: RunOptions, *,
    resume: Resume = False,
) -> Path:  # fmt: skip
    """Trains a model from nothing, or on from its newest checkpoint; returns the last checkpoint.

    Raises:
        ValueError: options that are wrong, or do not fit each other, the data, the tokenizer or the checkpoint.
        FloatingPointError, OSError, SystemExit: as `Trainer.run`.
    """
    output = Path(output)
    state = ranks.join(run.cpu)
    with ExitStack() as stack:
        stack.callback(state.destroy_process_group)  # its threads must not outlive the interpreter
        # What the folder and the process refuse is said before anything is read.
        check_surroundings(run, state.num_processes)
        ranks.on_main(lambda: stack.enter_context(locked(output)))
        ranks.on_main(lambda: start(output, resume, run.steps))
        return _trained(output, data, model, loss, run, resume)


def _trained(
    output: Path, data: DataOptions, model: ModelOptions, loss: LossOptions, run: RunOptions, resume: Resume
) -> Path:
    tokenizer = _tokenizer(model)
    doubt = check_tokens(tokenizer, model.embeddings) if model.tokenizer not in (None, model.embeddings) else None
    with named("source", "embeddings"):
        table = load_embeddings(model.embeddings, tokenizer, normalisation=model.normalisation, seed=loss.seed)
    torch.manual_seed(loss.seed)
    with named("num_attention_heads", "heads"):
        network = SmoothieModel(_config(data, model, table, tokenizer), table)
    TrainingLoss(network, loss)  # refuses options that do not fit the model before text is read
    state = PartialState()
    with state.main_process_first():
        texts, splits = _texts(data, tokenizer)
    network.config.unseen_token_ids = _unseen(splits["train"].counts["target"].special, tokenizer)
    record = as_record(data, model)
    record["data_fingerprint"] = fingerprints.of_tokens(texts.train)
    record["tokenizer_fingerprint"] = fingerprints.of_tokenizer(tokenizer)
    trainer = Trainer(network, texts, output, loss=loss, run=run, record=record, tokenizer=tokenizer)
    if state.is_main_process:
        doubts = [] if doubt is None else [f"warning: {doubt}"]
        print(*summary.of_text(splits, data, tokenizer), *doubts, summary.of_model(network, loss.step), sep="\n")
    return trainer.run(resume=resume)


def _tokenizer(model: ModelOptions) -> Any:
    name = model.tokenizer or model.embeddings
    if model.tokenizer is None and (name.startswith("random:") or Path(name).is_file()):
        raise ValueError(f"tokenizer must be given where embeddings are no model, got embeddings = {name!r}")
    return load_tokenizer(name, "embeddings" if model.tokenizer is None else "tokenizer")


def _unseen(seen: list[int], tokenizer: Any) -> list[int]:
    """Special tokens that no target has."""
    return sorted({*tokenizer.all_special_ids} - {*seen, pad_token(tokenizer)})


def _config(data: DataOptions, model: ModelOptions, table: torch.Tensor, tokenizer: Any) -> SmoothieConfig:
    source_length, target_length = data.lengths
    return SmoothieConfig(
        *table.shape,
        hidden_size=table.shape[1] if model.hidden_size is None else model.hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        dropout=model.dropout,
        condition_layers=0 if data.without_source else model.condition_layers,
        self_condition_layers=model.self_condition_layers,
        target_length=target_length,
        source_length=source_length,
        trainable_embeddings=model.trainable_embeddings,
        metric=model.metric,
        token_head=model.token_head,
        noise_schedule=model.noise_schedule,
        noise_options=_json(model.noise_options),
        sigma_min=model.sigma_min,
        pad_token_id=pad_token(tokenizer),
        eos_token_id=end_token(tokenizer),
    )


def _texts(data: DataOptions, tokenizer: Any) -> tuple[Texts, dict[str, summary.Split]]:
    source_length, target_length = data.lengths
    names = [name for name in ("train", "validation") if name == "train" or has_split(data.data, name)]
    texts = {
        name: read_text(
            data.data, name, source_column=data.source_column, target_column=data.target_column,
            unconditional=data.without_source,
        )
        for name in names
    }  # fmt: skip
    tokens, splits = {}, {}
    for name, text in texts.items():  # when both have been read: what is wrong with them is said first
        tokens[name], counts = tokenize(text.rows, tokenizer, target_length=target_length, source_length=source_length)
        splits[name] = summary.Split(text, counts)
    collate = Collate(pad_token(tokenizer), target_length, source_length)
    return Texts(tokens["train"], tokens.get("validation"), collate), splits


def _json(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"noise_options must be JSON, got {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"noise_options must be a JSON object, got {text!r}")
    return options


def arguments_parser() -> Parser:
    groups = (DataOptions, ModelOptions, LossOptions, RunOptions)
    parser = Parser(*groups, prog="smoothie-kernels train", usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "output", type=not_empty, metavar="OUTPUT", help="folder of the run, made where it is not there"
    )
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, type=_resume, metavar="auto",
        help="go on from the newest checkpoint in OUTPUT; auto: where there is one",
    )  # fmt: skip
    return parser


def _resume(text: str) -> Resume:
    return "auto" if text == "auto" else bool(string_to_bool(text))


def command(arguments: list[str]) -> int:
    """`smoothie-kernels train`: an error is one line on stderr; exit status 2 where options are wrong, 1 later."""
    # Gradients of cross-entropy are full of denormals, over which processors crawl. PyTorch's threads take this over
    # from the one that starts them, so it has to come before all work.
    torch.set_flush_denormal(True)
    parser = arguments_parser()
    try:
        data, model, loss, run, rest = parser.read(arguments)
        last = train(rest.output, data, model, loss, run, resume=rest.resume)
    except (FloatingPointError, OSError, TypeError, ValueError) as error:
        print(f"smoothie-kernels train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, TypeError | ValueError) else 1
    if PartialState().is_main_process:
        print(f"trained: {last}")
    return 0
