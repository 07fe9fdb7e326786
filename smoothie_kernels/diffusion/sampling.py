"""From noise to tokens: the loop over times, with one embedding per position carried from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from smoothie_kernels import Vocabulary, nearest_token
from smoothie_kernels.diffusion.live import FREE, Finished, Live, before, counts
from smoothie_kernels.diffusion.schedules import Schedule
from smoothie_kernels.diffusion.solvers import make_route
from smoothie_kernels.diffusion.states import State, make_state
from smoothie_kernels.stream import sum_dtype
from smoothie_kernels.vocabulary import as_vocabulary

MAX_ROW_ID = 2**32

Model = Callable[..., Tensor]
Guide = Callable[[Tensor, float], Tensor]
Progress = Callable[[int, int], object]


class Samples(NamedTuple):
    """What sampling gives, of B samples of L positions."""

    tokens: Tensor  # (B, L) int64, `pad` behind the end
    lengths: Tensor  # (B,) int64: positions up to and with the end token, or all that take part
    embeddings: Tensor  # (B, L, D): the last answers, zeros where a position takes no part
    steps: Tensor  # (B,) int64: how often the model was called for each
    history: Tensor | None = None  # (B, steps, L): the tokens after every step, where they were asked for


@torch.no_grad()
def sample(
    model: Model,
    embeddings: Tensor | Vocabulary,
    schedule: Schedule,
    *,
    length: int,
    sample_ids: Tensor | Sequence[int],
    steps: int = 200,
    times: Sequence[float] | None = None,
    solver: str = "re-noise",
    accumulate: str = "bridge",
    seed: int | Sequence[int] | None = 0,
    max_length: int | None = None,
    sigma_min: float = 1.5,
    condition: Any = None,
    empty_condition: Any = None,
    guidance: float = 0.0,
    guide: Guide | None = None,
    self_conditioning: bool = True,
    clamp: bool = False,
    fixed: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    end: int | None = None,
    pad: int = 0,
    excluded: Sequence[int] = (),
    stop_after: int | None = None,
    shrink_after: int | None = None,
    output_history: bool = False,
    progress: Progress | None = None,
    step: str = "fused",
    backend: str = "auto",
) -> Samples:
    """Samples of a Smoothie model: text out of noise.

    Equal to, for solver "re-noise", without ever holding a tensor of rows x vocabulary::

        logits, answer = schedule.prior_std * eps(0), zeros  # eps(offset): the field of (seed, offset, row id, token)
        for i in range(steps):
            answer = model(logits.softmax(-1) @ E, times[i], condition, answer)
            D = -torch.cdist(answer, E).square() / (2 * sigma_min**2)
            mu, std = schedule.marginal(times[i + 1])
            logits = mu * D + std * eps(i + 1)
        tokens = torch.cdist(answer, E).argmin(-1)

    Args:
        model: any callable f(smoothed, t, condition, self_condition) -> (b, L, D), the predicted embeddings; smoothed
            is (b, L, D), t (b,) float32, self_condition the last answer (zeros at first). b is the number of samples
            that are still under way. Where positions may leave (`lengths`, `shrink_after`) L may become less, and while
            samples differ in length there is a fifth argument, a (b, L) bool mask of the positions that take part.
        embeddings: (V, D) table or its `Vocabulary`. float64 computes in float64, by the reference backend.
        schedule: the forward process, with the sampler's delta.
        length: L, positions of every sample.
        sample_ids: B numbers that name the samples. A sample depends on its id and the seed, not on what else is in
            the batch.
        steps: how often the model is called: times = linspace(1, 0, steps + 1).
        times: those times themselves, falling; the last is where the last step would lead.
        solver: "re-noise" (the paper's), "ddim", "ddpm" or "sde"; `solvers` has their rules.
        accumulate: how "ddpm" and "sde" make the noise that they have gathered: "sum" of every step's field, or
            "bridge", of 2 + log2(steps) fields from the same law. The others take one field a step.
        seed: of the noise field; one for all, or one for each sample. None draws from torch's default generator.
        max_length: position p of sample i is row i * max_length + p of the noise field; None means L.
        sigma_min: scale of the distances.
        condition: what the model gets: None, or tensors (in tuples, named tuples, lists, dictionaries) whose first
            dimension is the sample.
        empty_condition, guidance: the answer is f + guidance * (f - f_empty), with f_empty for empty_condition.
        guide: a function of the answer (b, L, D) and the time that returns another one; for gradients of its own it has
            to enable them.
        self_conditioning: whether the model sees its last answer; None where not.
        clamp: replace every answer by the embedding of its nearest token.
        fixed: (B, L) int64 tokens that are given, -1 where a position is free. Their answers are their embeddings in
            every step, so all others see them, and they come out as they are.
        lengths: (B,): positions from there on take no part, neither in the step nor in the model's attention.
        end: the token that ends a text: the first one that has nothing fixed behind it but padding.
        pad: the token behind the end.
        excluded: tokens that no text gets, but where they are fixed: each of its positions gets the nearest other one.
        stop_after: a sample is done when its text, up to its end token, was the same for so many steps; None: never
            before the last. A text without an end token is not done: at first answers are next to the mean embedding.
        shrink_after: positions behind the end token leave when it was where it is for so many steps; None: never.
            Both look at the nearest tokens of the mean answer, which the step gives for nothing.
        output_history: keep the tokens of all steps: one more pass over the table in each.
        progress: called with (steps done, steps) after each.
        step: "fused" is `fused_smoothie_step`, "eager" the authors' dense arithmetic, which carries the logits.
        backend: as `fused_smoothie_step` takes it.

    Returns:
        Samples(tokens, lengths, embeddings, steps, history).

    Raises:
        TypeError, ValueError: a bad argument or a wrong answer of the model, by name.

    The same call on the same machine, with the same number of threads, gives the same bits. Another batch around a
    sample changes no more than rounding: its noise is the same. arXiv 2505.18853, section 4.
    """
    vocabulary = as_vocabulary(embeddings, backend)
    table = vocabulary.embeddings
    if times is None:
        _check_count("steps", steps)
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu").tolist()
    route = make_route(schedule, times, solver, accumulate)
    if not 0 < sigma_min < math.inf:
        raise ValueError(f"sigma_min must be positive and finite, got {sigma_min}")
    state = make_state(step, vocabulary, route, sigma_min, backend)
    if seed is None and step == "fused":  # one for all steps: solvers see the same noise again
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu"))
    _check_patience(state, stop_after=stop_after, shrink_after=shrink_after)
    if guidance and empty_condition is None:
        raise ValueError(f"empty_condition must be given with guidance = {guidance}, got None")
    live, seeds = _begin(table, length, max_length, sample_ids, seed, condition, empty_condition, fixed, lengths)
    ending = _Ending(end, pad, None if fixed is None else fixed.to(table.device))
    forbidden = _forbidden(excluded, vocabulary)
    finished = Finished(len(live.index), length, live.answer, len(route.times) if output_history else 0)

    def answered(smoothed: Tensor, time: float) -> Tensor:
        """The model's answer with all that is done to it."""
        t = torch.full((len(smoothed),), time, dtype=torch.float32, device=table.device)
        seen = (live.answer if self_conditioning else None, *(() if live.mask is None else (live.mask,)))
        answer = _checked("model", model(smoothed, t, live.condition, *seen), live.answer)
        if guidance:
            empty = _checked("model", model(smoothed, t, live.empty_condition, *seen), live.answer)
            answer = answer + guidance * (answer - empty)
        if guide is not None:
            answer = _checked("guide", guide(answer, time), live.answer)
        if clamp:
            answer = functional.embedding(nearest_token(answer, vocabulary, backend=backend).tokens, table).to(answer)
        if live.fixed is not None:
            given = functional.embedding(live.fixed.clamp(min=0), table)
            answer = given.to(answer).where((live.fixed != FREE)[..., None], answer)
        return answer

    def decoded(answer: Tensor) -> Tensor:
        return _nearest_of_others(answer, vocabulary, forbidden, backend)

    (carried,) = live.on_rows(state.begin, seeds)
    live = replace(live, carried=carried)
    for i, time in enumerate(route.times):
        smoothed, *tokens = live.on_rows(partial(state.smooth, i), seeds, live.carried)
        if i and (stop_after is not None or shrink_after is not None):
            live = live.look(tokens[0], *ending.of(tokens[0], live.lengths, live.fixed))
            if stop_after is not None and bool((done := live.same_text >= stop_after).any()):
                finished.put(live.of(done), i)
                live, smoothed = live.of(~done), smoothed[~done]
                if not len(live.index):
                    break
            if shrink_after is not None:
                ends = (live.text != FREE).sum(1)
                live = live.cut(ends.where(live.same_end >= shrink_after, live.lengths))
            smoothed = smoothed[:, : live.text.shape[1]]  # what left may have been the longest
        answer = answered(smoothed, time)
        if i + 1 < len(route.times):
            (carried,) = live.on_rows(partial(state.update, i), seeds, live.carried, answer)
            live = replace(live, carried=carried)
        live = replace(live, answer=answer)
        if output_history:
            finished.remember(i, live, decoded(answer))
        if progress is not None:
            progress(i + 1, len(route.times))
    finished.put(live, len(route.times))
    last = decoded(finished.embeddings)
    history = [ending.finish(then, finished.lengths)[0] for then in finished.history.unbind(1)]
    return Samples(
        *ending.finish(last, finished.lengths), finished.embeddings, finished.steps,
        torch.stack(history, 1) if output_history else None,
    )  # fmt: skip


def _forbidden(excluded: Sequence[int], vocabulary: Vocabulary) -> Tensor:
    """(V,) bool."""
    v, forbidden = len(vocabulary), torch.zeros(len(vocabulary), dtype=torch.bool, device="cpu")
    for token in excluded:
        if not 0 <= token < v:
            raise ValueError(f"excluded must be tokens in [0, V) with V = {v}, got {token}")
        forbidden[token] = True
    if bool(forbidden.all()):
        raise ValueError(f"excluded must leave a token, got all {v}")
    return forbidden.to(vocabulary.embeddings.device)


def _nearest_of_others(x: Tensor, vocabulary: Vocabulary, forbidden: Tensor, backend: str) -> Tensor:
    """The nearest tokens that are not forbidden. Only where one is found does its position cost a second look."""
    tokens = nearest_token(x, vocabulary, backend=backend).tokens
    wrong = forbidden[tokens]
    if bool(wrong.any()):
        others = (~forbidden).nonzero()[:, 0]
        tokens[wrong] = others[nearest_token(x[wrong], vocabulary.take(others), backend=backend).tokens]
    return tokens


class _Ending:
    """Where texts end, and what is behind."""

    def __init__(self, end: int | None, pad: int, fixed: Tensor | None) -> None:
        self.end, self.pad, self.fixed = end, pad, fixed

    def of(self, tokens: Tensor, lengths: Tensor, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
        """(b,): positions up to and with the first end token that has nothing fixed behind it but padding, or all; and
        whether there is such a token, or need not be."""
        if self.end is None:
            return lengths, torch.ones_like(lengths, dtype=torch.bool)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        ends = (tokens == self.end) & before(lengths, tokens.shape[1])
        if fixed is not None:
            text = (fixed != FREE) & (fixed != self.pad)
            ends = ends & (places >= (places * text).amax(1, keepdim=True))
        found = ends.any(1)
        return torch.where(found, ends.int().argmax(1) + 1, lengths), found

    def finish(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with what is given and what is behind the end, and the lengths of their texts."""
        if self.fixed is not None:
            tokens = torch.where(self.fixed != FREE, self.fixed, tokens)
        ends, _ = self.of(tokens, lengths, self.fixed)
        return tokens.where(before(ends, tokens.shape[1]), self.pad), ends


def _begin(
    table: Tensor, length: int, max_length: int | None, sample_ids: Tensor | Sequence[int],
    seed: int | Sequence[int] | None, condition: Any, empty_condition: Any, fixed: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
) -> tuple[Live, list[int | None]]:  # fmt: skip
    """All samples before the first step, and the call's different seeds."""
    _check_count("length", length)
    most = length if max_length is None else max_length
    _check_count("max_length", most)
    if most < length:
        raise ValueError(f"max_length must be at least length = {length}, got {most}")
    ids = _whole_numbers("sample_ids", sample_ids, None, table)
    if len(ids) and not (int(ids.min()) >= 0 and (int(ids.max()) + 1) * most <= MAX_ROW_ID):
        wanted = f"sample_ids must be in [0, {MAX_ROW_ID // most}), so that row ids of {most} positions fit in 32 bits"
        raise ValueError(f"{wanted}, got {int(ids.min())} to {int(ids.max())}")
    b = len(ids)
    for name, tree in (("condition", condition), ("empty_condition", empty_condition)):
        if wrong := counts(tree) - {b}:
            raise ValueError(f"{name} must hold tensors of {b} samples, got one of {min(wrong)}")
    seeds: list[int | None] = list(dict.fromkeys([seed] if seed is None or isinstance(seed, int) else seed)) or [0]
    if not (seed is None or isinstance(seed, int)) and len(seed) != b:
        raise ValueError(f"seed must be one number or {b}, one for each sample, got {len(seed)}")
    of_seed = [0] * b if len(seeds) == 1 else [seeds.index(each) for each in seed]  # type: ignore[union-attr]
    there = torch.full((b,), length, dtype=torch.int64, device=table.device)
    if lengths is not None:
        there = _whole_numbers("lengths", lengths, b, table)
        if b and not 1 <= int(there.min()) <= int(there.max()) <= length:
            raise ValueError(f"lengths must be in [1, {length}], got {int(there.min())} to {int(there.max())}")
    if fixed is not None:
        fixed = _checked_fixed(fixed, b, length, len(table), there)
    nothing = torch.zeros(b, length, table.shape[1], dtype=sum_dtype(table), device=table.device)
    text = torch.full((b, length), FREE, dtype=torch.int64, device=table.device)
    looks = torch.zeros(b, dtype=torch.int64, device=table.device)
    places, group = torch.arange(b, device=table.device), torch.tensor(of_seed, dtype=torch.int64, device=table.device)
    live = Live(
        places, ids * most, group, there, fixed, condition, empty_condition, nothing, nothing, text, looks, looks
    )
    return (live if lengths is None else live.cut(there)), seeds


def _whole_numbers(name: str, numbers: Tensor | Sequence[int], count: int | None, table: Tensor) -> Tensor:
    tensor = torch.as_tensor(numbers, device=table.device)
    if tensor.numel() == 0:
        tensor = tensor.long()
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or (count is not None and len(tensor) != count):
        wanted = (
            "whole numbers, one for each sample" if count is None else f"{count} whole numbers, one for each sample"
        )
        raise ValueError(f"{name} must be {wanted}, got {tensor.dtype} of shape {list(tensor.shape)}")
    return tensor


def _checked_fixed(fixed: Tensor, b: int, length: int, vocabulary: int, lengths: Tensor) -> Tensor:
    if not isinstance(fixed, Tensor) or fixed.dtype != torch.int64 or list(fixed.shape) != [b, length]:
        got = f"{fixed.dtype} of shape {list(fixed.shape)}" if isinstance(fixed, Tensor) else type(fixed).__name__
        raise ValueError(f"fixed must be torch.int64 of shape {[b, length]}, got {got}")
    fixed = fixed.to(lengths.device)
    if fixed.numel() and not (int(fixed.min()) >= FREE and int(fixed.max()) < vocabulary):
        wrong = int(fixed.min()) if int(fixed.min()) < FREE else int(fixed.max())
        raise ValueError(f"fixed must be tokens in [0, V) with V = {vocabulary}, or {FREE} where free, got {wrong}")
    if bool(((fixed != FREE) & ~before(lengths, length)).any()):
        raise ValueError("fixed must be free behind the lengths of its samples, got a token there")
    return fixed


def _checked(name: str, answer: object, like: Tensor) -> Tensor:
    if not isinstance(answer, Tensor) or answer.shape != like.shape or not answer.is_floating_point():
        got = f"{answer.dtype} of shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"{name} must return embeddings of shape {list(like.shape)}, got {got}")
    return answer.to(like.dtype)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


def _check_patience(state: State, **patience: int | None) -> None:
    for name, steps in patience.items():
        if steps is not None:
            _check_count(name, steps)
            if not state.knows_tokens:
                raise ValueError(f"{name} must be None with step 'eager', which does not know its tokens, got {steps}")
