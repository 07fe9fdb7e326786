"""A model in half precision: answers and samples are the float32 model's, but for the roundings of its own type.

A rounding to half precision is off by at most u, half the type's eps. Every module without children rounds twice, its
weights and its result. Roundings are independent, so their squares add up: sqrt(2 modules) u in one answer.
"""

import pytest
import torch

pytest.importorskip("transformers", reason="comes with the extra `train`")

import small
import training
from training import D, L, S, V

from smoothie_kernels.diffusion import SmoothieModel, SmoothiePipeline
from smoothie_kernels.diffusion.batches import Collate
from smoothie_kernels.diffusion.loss import TrainingLoss
from smoothie_kernels.diffusion.noising import noise_tokens
from smoothie_kernels.diffusion.options import LossOptions
from smoothie_kernels.diffusion.trainer import Texts, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {
    "conditional": {}, "tokens": {"token_head": True}, "table": {"trainable_embeddings": True},
    "same width": {"hidden_size": D},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)
every_type = pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)


def model(**changes) -> SmoothieModel:
    return training.model(eos_token_id=3, pad_token_id=0, **changes).eval()


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def tolerance(half: SmoothieModel) -> float:
    modules = sum(not [*module.children()] for module in half.modules())
    return (2 * modules) ** 0.5 * rounding(half.dtype)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@every_type
@every_kind
def test_answer(kind, dtype):
    exact, half = model(**KINDS[kind]), model(**KINDS[kind]).to(dtype)
    smoothed, answer, t, source = torch.randn(4, L, D), torch.randn(4, L, D), torch.rand(4), torch.randint(V, (4, S))
    for extra in ((), (answer,), (answer, torch.rand(4, L) < 0.7)):
        found = half(smoothed, t, half.encode(source), *extra)
        assert found.dtype == torch.float32
        assert relative(found, exact(smoothed, t, exact.encode(source), *extra)) < tolerance(half)


@every_type
def test_times_are_rounded_as_sines_not_as_angles(dtype):
    half, seen, t = model().to(dtype), [], torch.rand(40)
    half.time.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    half(torch.randn(40, L, D), t, half.encode(torch.randint(V, (40, S))))
    wide = half.config.hidden_size
    angles = 1000 * t.double()[:, None] * 1e-4 ** (torch.arange(wide // 2).double() * 2 / wide)
    exact = torch.cat((angles.sin(), angles.cos()), 1)
    of_angles = 1000 * 3 * rounding(torch.float32)  # time, frequency, product
    assert float((seen[0].double() - exact).abs().max()) < rounding(dtype) + of_angles


@pytest.mark.parametrize("options", [{}, {"step": "eager"}, {"guidance": 0.5, "solver": "ddpm"}], ids=str)
@every_type
@every_kind
def test_samples(kind, dtype, options):
    """At most the sum of the errors of all answers: the step in between averages, and does not add to them."""
    exact, half = model(**KINDS[kind]), model(**KINDS[kind]).to(dtype)
    source = torch.randint(V, (4, S))
    found, wanted = (m.generate(source, steps=3, **options) for m in (half, exact))
    assert found.embeddings.dtype == torch.float32
    assert relative(found.embeddings, wanted.embeddings) < 3 * tolerance(half)
    assert half.generate(source, steps=2, clamp=True, fixed=wanted.tokens).tokens.equal(wanted.tokens)


@pytest.mark.parametrize("step", ["fused", "eager"])
@every_type
def test_noised_tokens_have_the_roundings_of_table_and_result(dtype, step):
    tokens, table, options = torch.randint(V, (4, L)), torch.randn(V, 64), {"t": 0.02, "seed": 3, "step": step}
    found, wanted = (noise_tokens(tokens, e, model().schedule(), **options) for e in (table.to(dtype), table))
    assert found.dtype == dtype
    assert relative(found, wanted) < 2 * rounding(dtype)


@every_type
def test_loading_and_the_pipeline(tmp_path, dtype):
    model().save_pretrained(tmp_path / "float32")
    loaded = SmoothieModel.from_pretrained(tmp_path / "float32", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    small.tokenizer().save_pretrained(tmp_path / "half")
    loaded.save_pretrained(tmp_path / "half")
    made = SmoothiePipeline.from_pretrained(tmp_path / "half")(["the king", "a cat"], steps=2)
    assert made == SmoothiePipeline(model().to(dtype), small.tokenizer())(["the king", "a cat"], steps=2)


@every_type
def test_it_does_not_train(tmp_path, dtype):
    half = model().to(dtype)
    message = rf"model must be in float32 to train \(load it with dtype=torch.float32; .*\), got {dtype}"
    with pytest.raises(ValueError, match=message):
        TrainingLoss(half, LossOptions())
    rows = training.rows(4, 1)
    with pytest.raises(ValueError, match=message):
        Trainer(half, Texts(rows, rows, Collate(0, L, S)), tmp_path)
