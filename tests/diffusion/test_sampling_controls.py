"""What a caller of the sampler may choose: fixed positions, lengths, when samples leave, what is done to answers."""

from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import (
    ARCTAN,
    BATCH,
    F32,
    IDS,
    VARIANTS,
    D,
    L,
    Mix,
    batch,
    check_same,
    condition_of,
    fixed_of,
    part,
    play,
    table_of,
    up_to,
)  # fmt: skip
from test_solvers import linspace

from smoothie_kernels.diffusion import make_schedule
from smoothie_kernels.diffusion.sampling import sample
from smoothie_kernels.diffusion.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Fixed positions


@pytest.mark.parametrize("name", VARIANTS)
def test_fixed_positions_come_out_as_they_are(name):
    fixed = fixed_of(BATCH)
    samples = batch(fixed=fixed, **VARIANTS[name] | {"end": None})
    assert 0.2 < float((fixed >= 0).float().mean()) < 0.4
    assert torch.equal(samples.tokens[fixed >= 0], fixed[fixed >= 0])
    assert torch.equal(samples.embeddings[fixed >= 0], table_of()[fixed[fixed >= 0]])
    free = batch(**VARIANTS[name] | {"end": None})
    assert (samples.embeddings - free.embeddings)[fixed < 0].abs().max() > 0.1
    rows = [4, 11, 2]
    check_same(batch(rows, fixed=fixed[rows], **VARIANTS[name] | {"end": None}), part(samples, rows))


def test_other_positions_see_what_is_fixed():
    """A model whose answer is its left neighbour's: what is fixed at the left end walks to the right."""
    fixed = torch.full((2, L), -1)
    fixed[:, 0] = torch.tensor([17, 23])
    seen = []

    def neighbour(smoothed, t, condition, answer):
        seen.append((smoothed, answer))
        return answer.roll(1, 1)

    samples = sample(neighbour, table_of(), ARCTAN, length=L, sample_ids=[0, 1], steps=L, fixed=fixed)
    assert samples.tokens.tolist() == [[17] * L, [23] * L]
    assert all(torch.equal(answer[:, 0], table_of()[fixed[:, 0]]) for _, answer in seen[1:])
    # Near the end the step's smoothed embeddings say the same.
    late = make_schedule("cosine", delta=0.0)
    sample(neighbour, table_of(), late, length=L, sample_ids=[0, 1], times=[1.0, 1e-3, 0.0], sigma_min=0.3, fixed=fixed)
    torch.testing.assert_close(seen[-1][0][:, 0], table_of()[fixed[:, 0]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "fixed", "text"),
    [
        ([7, 1, 8, 1, 9], [-1, -1, -1, -1, -1], [7, 1]),
        ([7, 1, 8, 1, 9], [-1, -1, 6, -1, -1], [7, 1, 6, 1]),
        ([7, 1, 8, 1, 9], [-1, -1, 1, -1, -1], [7, 1, 1]),
        ([7, 1, 8, 1, 9], [-1, -1, -1, -1, 4], [7, 1, 8, 1, 4]),
        ([7, 1, 8, 1, 9], [-1, -1, -1, -1, 1], [7, 1, 8, 1, 1]),
        ([7, 1, 8, 1, 9], [1, -1, -1, -1, -1], [1]),
        ([7, 1, 8, 1, 9], [6, -1, -1, -1, -1], [6, 1]),
        ([7, 2, 8, 3, 9], [6, -1, -1, -1, -1], [6, 2, 8, 3, 9]),
        ([7, 1, 8, 1, 9], [-1, -1, -1, 40, 40], [7, 1]),
        ([7, 1, 8, 1, 9], [-1, 40, 6, -1, 40], [7, 40, 6, 1]),
    ],
    ids=str,
)
def test_a_text_ends_where_nothing_but_padding_is_fixed_behind(tokens, fixed, text):
    samples, _ = play([[tokens] * 3], fixed=torch.tensor([fixed]), pad=40)
    assert samples.lengths.tolist() == [len(text)]
    assert samples.tokens.tolist() == [text + [40] * (5 - len(text))]


# --- Lengths


@pytest.mark.parametrize("solver", ["re-noise", "ddpm"])
def test_positions_behind_the_lengths(solver):
    """Each comes out as alone, without any padding."""
    lengths = [5, 2, 1, 3]
    model = Mix()
    options = {"steps": 8, "solver": solver, "max_length": 9, "pad": 33}
    samples = sample(model, table_of(), ARCTAN, length=7, sample_ids=range(4), lengths=lengths, **options)
    for i, length in enumerate(lengths):
        alone = sample(Mix(), table_of(), ARCTAN, length=length, sample_ids=[i], **options)
        assert torch.equal(samples.tokens[i, :length], alone.tokens[0])
        torch.testing.assert_close(samples.embeddings[i, :length], alone.embeddings[0], rtol=1e-4, atol=2e-5)
        assert samples.tokens[i, length:].tolist() == [33] * (7 - length)
        assert bool((samples.embeddings[i, length:] == 0).all())
    assert samples.lengths.tolist() == lengths
    for smoothed, _, _, answer, mask in model.calls:
        assert smoothed.shape == answer.shape == (4, 5, D)
        assert torch.equal(mask, torch.arange(5) < torch.tensor(lengths)[:, None])
        assert bool((smoothed[~mask] == 0).all())


@pytest.mark.parametrize("lengths", [[4, 4, 4], torch.tensor([4, 4, 4])], ids=["list", "tensor"])
def test_equal_lengths_are_a_shorter_length(lengths):
    model = Mix()
    samples = sample(model, table_of(), ARCTAN, length=L, sample_ids=IDS, steps=6, lengths=lengths, pad=2)
    shorter = sample(Mix(), table_of(), ARCTAN, length=4, sample_ids=IDS, steps=6, max_length=L)
    assert all(call[4] is None for call in model.calls)
    assert torch.equal(samples.embeddings[:, :4], shorter.embeddings)
    assert torch.equal(samples.tokens[:, :4], shorter.tokens)
    assert samples.tokens[:, 4:].tolist() == [[2, 2]] * 3
    full = sample(Mix(), table_of(), ARCTAN, length=L, sample_ids=IDS, steps=6, lengths=[L] * 3)
    assert torch.equal(full.tokens, sample(Mix(), table_of(), ARCTAN, length=L, sample_ids=IDS, steps=6).tokens)


@pytest.mark.parametrize("longest", [L, L - 2])
def test_lengths_with_fixed_positions(longest):
    """Also where no sample is as long as the call."""
    lengths = torch.tensor([longest, 2, 3])
    fixed = torch.tensor([[8, -1, 9, -1, -1, -1], [-1, 7, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])
    samples = sample(Mix(), table_of(), ARCTAN, length=L, sample_ids=IDS, steps=6, lengths=lengths, fixed=fixed, pad=2)
    assert torch.equal(samples.tokens[fixed >= 0], fixed[fixed >= 0])
    assert bool((samples.tokens[torch.arange(L) >= lengths[:, None]] == 2).all())
    alone = sample(
        Mix(), table_of(), ARCTAN, length=2, sample_ids=IDS[1:2], steps=6, fixed=fixed[1:2, :2], max_length=L
    )  # fmt: skip
    assert torch.equal(samples.tokens[1, :2], alone.tokens[0])


# --- Samples that are done, positions that leave


def follow(script, *, end, stop_after=None, shrink_after=None, length=None):
    """One sample's (steps, length at the end, lengths that its model calls had), as the contract says it.

    script[i] are the tokens that call i answers; before call i the text so far is looked at.
    """
    length = len(script[0]) if length is None else length
    text, had = None, []
    same_text = same_end = 0
    for i in range(len(script)):
        if i and (stop_after or shrink_after):
            tokens, before = script[i - 1][:length], text
            text = tokens if end is None else up_to(end, tokens) if end in tokens else None
            same_text = same_text + 1 if text is not None and text == before else 0
            same_end = same_end + 1 if text is not None and before and len(text) == len(before) else 0
            if stop_after and same_text >= stop_after:
                return i, length, had
            if shrink_after and same_end >= shrink_after:
                length = len(text)
        had.append(length)
    return len(script), length, had


def check_play(script, *, end=1, stop_after=None, shrink_after=None, lengths=None):
    count, steps, length = len(script), len(script[0]), len(script[0][0])
    progress = []
    samples, model = play(
        script, end=end, stop_after=stop_after, shrink_after=shrink_after, lengths=lengths, pad=40,
        output_history=True, progress=lambda *now: progress.append(now),
    )  # fmt: skip
    all_lengths = lengths or [length] * count
    stories = [
        follow(story, end=end, stop_after=stop_after, shrink_after=shrink_after, length=own)
        for story, own in zip(script, all_lengths, strict=True)
    ]
    assert samples.steps.tolist() == [done for done, _, _ in stories]
    assert progress == [(i + 1, steps) for i in range(max(samples.steps.tolist(), default=0))]
    for i, (done, left, _) in enumerate(stories):
        texts = []
        for then in range(steps):
            tokens = script[i][min(then, done - 1)][:left]
            texts.append(up_to(end, tokens))
        assert samples.lengths[i] == len(texts[-1])
        assert samples.tokens[i].tolist() == texts[-1] + [40] * (length - len(texts[-1]))
        assert samples.history[i].tolist() == [text + [40] * (length - len(text)) for text in texts]
        assert torch.equal(samples.embeddings[i, :left], table_of()[script[i][done - 1][:left]])
        assert bool((samples.embeddings[i, left:] == 0).all())
    for i, (places, seen, mask, _) in enumerate(model.calls):
        assert places == [place for place, (done, _, _) in enumerate(stories) if done > i]
        then = [stories[place][2][i] for place in places]
        assert seen == max(then)
        assert (mask is None) == (min(then) == max(then))
        assert mask is None or mask.sum(1).tolist() == then
    return samples


STORIES = {
    "settles at once": [[5, 1, 6, 7]] * 8,
    "settles": [[5, 6, 7, 8], [5, 6, 7, 1], [5, 6, 1, 8], *([5, 9, 1, last] for last in (8, 7, 4, 3)), [2, 2, 2, 2]],
    "never ends": [[5, 6, 7, 8]] * 8,
    "ends with its last position": [[5, 6, 7, 1]] * 8,
    "comes and goes": [[5, 1, 6, 7], [5, 6, 6, 7]] * 4,
    "another end": [[5, 6, 1, 7]] * 3 + [[5, 1, 1, 7]] * 5,
    "the end is lost": [[5, 6, 1, 7]] * 3 + [[5, 6, 8, 9]] * 5,
}  # fmt: skip


@pytest.mark.parametrize("shrink_after", [None, 1, 3])
@pytest.mark.parametrize("stop_after", [None, 1, 3, 20])
def test_stopping_and_shrinking(stop_after, shrink_after):
    check_play([*STORIES.values()], stop_after=stop_after, shrink_after=shrink_after)


@pytest.mark.parametrize(
    ("name", "patience", "steps"),
    [
        ("settles at once", 1, 2), ("settles at once", 3, 4), ("settles at once", 7, 8), ("settles at once", 8, 8),
        ("settles", 2, 6), ("never ends", 1, 8), ("ends with its last position", 1, 2), ("comes and goes", 1, 8),
        ("another end", 3, 7), ("the end is lost", 3, 8), ("the end is lost", 2, 3),
    ],
)  # fmt: skip
def test_number_of_steps(name, patience, steps):
    """By hand: steps are how often the model was called."""
    samples, model = play([STORIES[name]], stop_after=patience)
    assert samples.steps.tolist() == [steps]
    assert len(model.calls) == steps


def test_without_an_end_token_all_is_text():
    samples = check_play([STORIES["never ends"], STORIES["comes and goes"]], end=None, stop_after=2)
    assert samples.steps.tolist() == [3, 8]
    check_play([*STORIES.values()], end=None, stop_after=1, shrink_after=1)


def of(size, elements):
    return st.lists(elements, min_size=size, max_size=size)


stories = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5)).flatmap(
    lambda shape: of(shape[0], of(shape[1], of(shape[2], st.integers(1, 3))))
)


@settings(max_examples=80, deadline=None)
@given(stories, st.one_of(st.none(), st.integers(1, 3)), st.one_of(st.none(), st.integers(1, 3)), st.data())
def test_stopping_and_shrinking_of_any_kind(script, stop_after, shrink_after, data):
    lengths = data.draw(st.one_of(st.none(), of(len(script), st.integers(1, len(script[0][0])))))
    end = data.draw(st.sampled_from((1, 1, 1, None)))
    check_play(script, stop_after=stop_after, shrink_after=shrink_after, lengths=lengths, end=end)


def test_the_longest_may_leave_first():
    """What is left is shorter than the call, without shrink_after."""
    quick, slow = [[5, 6, 1, 7]] * 8, [[5, 6, 7, 7], [6, 5, 7, 7]] * 4
    samples = check_play([quick, slow], stop_after=1, lengths=[4, 2])
    assert samples.steps.tolist() == [2, 8]


def test_those_that_leave_change_nothing_for_others():
    """Of a real model: what has no end yet comes out as without patience, in the steps that it takes."""
    plain = batch(end=3)
    impatient = batch(end=3, stop_after=1)
    assert impatient.steps.min() < 10
    full = impatient.steps == 10
    assert 0 < full.sum() < BATCH
    assert torch.equal(plain.tokens[full], impatient.tokens[full])
    torch.testing.assert_close(plain.embeddings[full], impatient.embeddings[full], rtol=1e-4, atol=2e-5)


def test_mean_answers_are_looked_at():
    """With ddim the text that settles is that of the mean of all answers."""
    samples, _ = play([STORIES["settles at once"]], stop_after=2, solver="ddim")
    assert samples.steps.tolist() == [3]


def test_fixed_text_ends_too():
    """The end token has to come behind what is fixed."""
    fixed = torch.tensor([[-1, -1, 6, -1], [-1, -1, -1, -1]])
    samples, model = play([[[5, 1, 7, 8]] * 6] * 2, fixed=fixed, stop_after=2, shrink_after=1)
    assert samples.steps.tolist() == [6, 3]
    assert samples.tokens.tolist() == [[5, 1, 6, 8], [5, 1, 0, 0]]
    assert model.calls[2][2].tolist() == [[True] * 4, [True, True, False, False]]


# --- What is done to answers


def test_guidance():
    """f + c (f - f_empty), and two calls of the model."""
    full, empty = condition_of(), condition_of().flip(0)
    inner = Mix()

    def by_hand(smoothed, t, condition, answer):
        f, f_empty = inner(smoothed, t, full, answer), inner(smoothed, t, empty, answer)
        return f + 1.7 * (f - f_empty)

    options = {"length": L, "sample_ids": IDS, "steps": 6}
    model = Mix()
    guided = sample(model, table_of(), ARCTAN, condition=full, empty_condition=empty, guidance=1.7, **options)
    torch.testing.assert_close(guided.embeddings, sample(by_hand, table_of(), ARCTAN, **options).embeddings)
    assert len(model.calls) == 12
    assert all(torch.equal(a, b) for one, other in zip(model.calls[::2], model.calls[1::2], strict=True)
               for a, b in ((one[0], other[0]), (one[1], other[1]), (one[3], other[3])))  # fmt: skip
    unguided = sample(Mix(), table_of(), ARCTAN, condition=full, **options)
    without = sample(Mix(), table_of(), ARCTAN, condition=full, empty_condition=empty, guidance=0.0, **options)
    assert torch.equal(unguided.embeddings, without.embeddings)
    assert (unguided.embeddings - guided.embeddings).abs().max() > 0.1


@pytest.mark.parametrize("gradients", [False, True])
def test_guide(gradients):
    """Changes answers after guidance; with gradients of its own where it enables them."""
    times, goal = [], table_of()[7]

    def guide(answer, time):
        times.append(time)
        assert not torch.is_grad_enabled()
        if not gradients:
            return answer - 0.3 * (answer - goal)
        with torch.enable_grad():
            answer = answer.clone().requires_grad_()
            (slope,) = torch.autograd.grad((answer - goal).square().sum(), answer)
            return answer - 0.15 * slope

    def by_hand(*inputs):
        answer = Mix()(*inputs)
        return answer - 0.3 * (answer - goal)

    options = {"length": L, "sample_ids": IDS, "steps": 6, "condition": condition_of()}
    guided = sample(Mix(), table_of(), ARCTAN, guide=guide, **options)
    torch.testing.assert_close(guided.embeddings, sample(by_hand, table_of(), ARCTAN, **options).embeddings)
    assert times == linspace(6)[:-1]
    assert not guided.embeddings.requires_grad


def test_clamp():
    """Every answer that the model sees is the embedding of the token that was nearest."""
    table, model = table_of(), Mix()
    answers = []

    def remembering(*inputs):
        answers.append(model(*inputs))
        return answers[-1]

    samples = sample(remembering, table, ARCTAN, length=L, sample_ids=IDS, steps=6, clamp=True)
    clamped = [*(call[3] for call in model.calls[1:]), samples.embeddings]
    for answer, other in zip(answers, clamped, strict=True):
        assert torch.equal(other, table[torch.cdist(answer, table).argmin(-1)])
    assert torch.equal(samples.embeddings, table[samples.tokens])


def test_order_of_what_is_done():
    """Guidance, guide, clamp, fixed."""
    table, fixed = table_of(), fixed_of(3)
    seen = []

    def guide(answer, time):
        seen.append(answer)
        return table[7].expand_as(answer) + 1e-3

    samples = sample(Mix(), table, ARCTAN, length=L, sample_ids=IDS, steps=2, condition=condition_of(), guidance=2.0,
                     empty_condition=condition_of().flip(0), guide=guide, clamp=True, fixed=fixed)  # fmt: skip
    assert torch.equal(samples.embeddings, table[fixed.where(fixed >= 0, 7)])
    assert len(seen) == 2


@pytest.mark.parametrize("self_conditioning", [True, False])
def test_self_conditioning(self_conditioning):
    model = Mix()
    answers = []

    def remembering(*inputs):
        answers.append(model(*inputs))
        return answers[-1]

    sample(remembering, table_of(), ARCTAN, length=L, sample_ids=IDS, steps=4, self_conditioning=self_conditioning)
    seen = [call[3] for call in model.calls]
    if not self_conditioning:
        assert seen == [None] * 4
    else:
        assert torch.equal(seen[0], torch.zeros(3, L, D))
        assert all(torch.equal(a, b) for a, b in zip(seen[1:], answers, strict=False))


Pair = namedtuple("Pair", "states more")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, x + 100), lambda x: Pair(x, (x[:, None], None)), lambda x: {"a": x, "b": [x, None]},
        lambda x: [Pair({"x": x}, ()), "name", 3],
    ],
    ids=["tuple", "named tuple", "dict", "list"],
)  # fmt: skip
def test_conditions_follow_their_samples(wrap):
    """Kind by kind, also the empty one; what is no tensor stays."""
    script = torch.tensor([[[5, 1]] * 4, [[5, 6], [6, 5]] * 2, [[4, 5], [5, 1], [5, 1], [5, 1]], [[7, 8]] * 4])
    table, places = table_of(), torch.arange(4)
    seen = []

    def model(smoothed, t, condition, answer):
        seen.append(condition)
        first = condition
        while not isinstance(first, torch.Tensor):
            first = next(iter(first.values() if isinstance(first, dict) else first))
        return table[script[first % 10, (len(seen) - 1) // 2]]

    sample(model, table, ARCTAN, length=2, sample_ids=range(4), steps=4, end=1, stop_after=1, guidance=0.5,
           condition=wrap(places), empty_condition=wrap(places + 10))  # fmt: skip
    there = [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [1, 3]]

    def check(tree, wanted):
        assert type(tree) is type(wanted)
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(tree, wanted)
        elif isinstance(wanted, dict):
            assert tree.keys() == wanted.keys()
            check([*tree.values()], [*wanted.values()])
        elif isinstance(wanted, tuple | list):
            for some, other in zip(tree, wanted, strict=True):
                check(some, other)
        else:
            assert tree == wanted

    for i, rows in enumerate(there):
        check(seen[2 * i], wrap(torch.tensor(rows)))
        check(seen[2 * i + 1], wrap(torch.tensor(rows) + 10))
    assert len(seen) == 8


# --- On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("solver", SOLVERS)
def test_on_a_gpu(solver):
    """The same samples as on the CPU, with all that a caller may choose."""
    options = {
        "length": L, "sample_ids": IDS, "steps": 8, "solver": solver, "fixed": fixed_of(3), "lengths": [L, L - 1, L],
        "seed": [1, 2, 1], "guidance": 0.5, "stop_after": 6, "shrink_after": 4, "end": 1, "output_history": True,
    }  # fmt: skip
    options["fixed"][1, L - 1] = -1
    found = {}
    for device in ("cpu", "cuda"):
        given = {name: condition_of().to(device, F32) for name in ("condition", "empty_condition")}
        found[device] = sample(Mix(), table_of().to(device), ARCTAN, **options, **given)
    assert torch.equal(found["cuda"].tokens.cpu(), found["cpu"].tokens)
    assert torch.equal(found["cuda"].history.cpu(), found["cpu"].history)
    torch.testing.assert_close(found["cuda"].embeddings.cpu(), found["cpu"].embeddings, rtol=1e-3, atol=1e-4)
