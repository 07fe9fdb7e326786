"""Models whose steps take cosines or learned distances."""

import pytest
import torch
from samplers import check_same
from test_generation import TOKENS, given, untrained
from test_model import D, small
from torch.nn.functional import normalize

from smoothie_kernels import Vocabulary, nearest_token
from smoothie_kernels.diffusion import make_schedule
from smoothie_kernels.diffusion.sampling import sample

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("solver", ["re-noise", "ddpm"])
@pytest.mark.parametrize("metric", ["cosine", "learned"])
def test_other_distances(metric, solver):
    """Of cosines a sampler carries the mean of directions, and its length."""
    torch.manual_seed(2)
    model = untrained(metric=metric, **TOKENS).eval()
    if metric == "learned":
        model.factor.data += 0.3 * torch.randn_like(model.factor)
    eager, fused = (
        model.generate(**given(model), steps=8, solver=solver, accumulate="sum", step=step)
        for step in ("eager", "fused")
    )
    check_same(eager, fused)


def test_a_learned_metric_keeps_the_length_of_distances():
    """However long its factor: else that would grow, to be rid of the noise."""
    model = small(metric="learned")
    table = model.embeddings.weight
    assert torch.equal(model.vocabulary().metric, torch.eye(D))
    for times in (1.0, 30.0):
        with torch.no_grad():
            model.factor.copy_(times * torch.randn(D, D))
        metric = model.vocabulary().metric
        torch.testing.assert_close((table @ metric).square().sum(), table.square().sum())
        (gradient,) = torch.autograd.grad((metric * torch.randn(D, D)).sum(), model.factor)
        assert abs((gradient * model.factor).sum()) < 1e-5 * gradient.norm() * model.factor.norm()


@pytest.mark.parametrize("metric", ["cosine", "factor"])
def test_excluded_tokens_give_way_to_the_next_by_the_same_distance(metric):
    torch.manual_seed(3)
    table, answer = torch.randn(40, 8) * torch.rand(40, 1) * 4, torch.randn(1, 5, 8)
    factor = torch.randn(8, 8)
    vocabulary = Vocabulary(table, metric=factor if metric == "factor" else metric)
    excluded = nearest_token(answer, vocabulary).tokens.unique().tolist()
    given = {"length": 5, "sample_ids": [0], "steps": 2, "seed": 0, "excluded": excluded}
    found = sample(lambda *_: answer, vocabulary, make_schedule("arctan"), **given).tokens
    spaces = (answer[0] @ factor, table @ factor) if metric == "factor" else map(normalize, (answer[0], table))
    distances = torch.cdist(*spaces)
    distances[:, excluded] = torch.inf
    assert torch.equal(found[0], distances.argmin(1))
