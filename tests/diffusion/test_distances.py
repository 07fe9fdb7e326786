"""Models whose steps take cosines or learned distances."""

import pytest
import torch
from samplers import check_same
from test_generation import TOKENS, given, untrained
from test_model import D, small

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
