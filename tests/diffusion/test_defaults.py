"""The default dtype and the default device of torch change nothing: every tensor that is made here names its own."""

import csv
import tempfile
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch

pytest.importorskip("transformers", reason="comes with the extra `train`")

import small
import training
from training import L, S

from smoothie_kernels.diffusion import SmoothiePipeline
from smoothie_kernels.diffusion.batches import Collate
from smoothie_kernels.diffusion.embeddings import load_embeddings
from smoothie_kernels.diffusion.evaluation import evaluate
from smoothie_kernels.diffusion.loss import Place, TrainingLoss
from smoothie_kernels.diffusion.model import SmoothieModel
from smoothie_kernels.diffusion.noising import noise_tokens
from smoothie_kernels.diffusion.options import LossOptions, RunOptions
from smoothie_kernels.diffusion.schedules import SCHEDULES, make_schedule
from smoothie_kernels.diffusion.trainer import Texts, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
DEFAULTS = {
    "float64": {"dtype": torch.float64}, "bfloat16": {"dtype": torch.bfloat16}, "float16": {"dtype": torch.float16},
    "meta": {"device": "meta"},
}  # fmt: skip
ROWS = training.rows(4, 1)
CHANGES = {"frozen": {"dropout": 0.0}, "table": {"trainable_embeddings": True, "token_head": True, "dropout": 0.0}}


@contextmanager
def defaults(dtype: torch.dtype | None = None, device: str | None = None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def schedules() -> list[torch.Tensor]:
    times = 0.0, 0.3, torch.tensor([0.1, 0.9], dtype=torch.float32, device="cpu")
    return [m for name in SCHEDULES for t in times for m in make_schedule(name).marginal(t)]


def noised(model: SmoothieModel) -> list[torch.Tensor]:
    tokens = torch.arange(2 * L, dtype=torch.int64, device="cpu").view(2, L)
    options = {"seed": 3, "t": 0.2, "schedule": model.schedule()}
    return [
        noise_tokens(tokens, model.vocabulary(), step=step, mask=mask, **options)
        for step in ("fused", "eager") for mask in (None, tokens % 3 > 0)
    ]  # fmt: skip


def losses(model: SmoothieModel) -> list[torch.Tensor]:
    collate, found = Collate(0, L, S), []
    for options in ({}, {"step": "eager", "skip_padding": True, "guidance_dropout": 0.5, "x_0_variance": 0.1}):
        model.zero_grad()
        parts = TrainingLoss(model, LossOptions(**options))(collate(ROWS), Place(3, 0, 4))
        parts.total.backward()
        found += [*parts, *(p.grad for p in model.parameters() if p.requires_grad)]
    metrics = evaluate(model, [(0, collate(ROWS))], 4, LossOptions()).metrics()
    return [*found, torch.tensor([*metrics.values()], dtype=torch.float64, device="cpu")]


def sampled(model: SmoothieModel) -> list[torch.Tensor]:
    pipe, found = SmoothiePipeline(model, small.tokenizer()), []
    for options in ({}, {"step": "eager"}, {"solver": "ddpm", "guidance": 0.5, "prefixes": "where", "stop_after": 1}):
        made = pipe(["the king", "a cat and dog"], steps=3, **options)
        found += [torch.tensor(each.tokens, dtype=torch.int64, device="cpu") for each in made]
    model.train()
    return [*found, *model.generate(**{"source": torch.ones(2, 3, dtype=torch.int64, device="cpu")}, steps=3)[:4]]


def check_defaults(results, names=DEFAULTS) -> None:
    wanted = results()
    for name in names:
        with defaults(**DEFAULTS[name]):
            found = results()
        assert [each.dtype for each in found] == [each.dtype for each in wanted], name
        assert all(map(torch.equal, found, wanted)), name


@pytest.mark.parametrize("change", CHANGES)
def test_of_losses_and_samples(change):
    model = training.model(eos_token_id=3, pad_token_id=0, **CHANGES[change])
    parts = noised, losses, sampled
    check_defaults(lambda: [each.detach().clone() for part in parts for each in part(model)])


def test_of_schedules():
    check_defaults(schedules)


def test_of_tables(tmp_path):
    (tmp_path / "words.txt").write_text("king 1 2\nqueen 0.3 4\n")
    sources = "random:2", str(tmp_path / "words.txt")
    check_defaults(lambda: [load_embeddings(source, tokenizer=small.tokenizer()) for source in sources])


def test_of_training(tmp_path):
    model, texts = training.model(), Texts(ROWS, ROWS, Collate(0, L, S))

    def trained() -> list[torch.Tensor]:
        run = RunOptions(**training.RUN | {"steps": 2})
        folder = Trainer(deepcopy(model), texts, tempfile.mkdtemp(dir=tmp_path), run=run).run()
        (row,) = csv.DictReader((folder.parent / "metrics.csv").open())
        loss = torch.tensor(float(row["loss"]), dtype=torch.float64, device="cpu")
        return [*training.weights(folder).values(), loss]

    check_defaults(trained, [*DEFAULTS][:-1])  # torch's DataLoader draws a number on the default device
