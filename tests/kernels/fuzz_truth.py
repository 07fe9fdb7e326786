"""What fuzz.py holds results against: dense float64, with bounds that grow with the sizes of all terms."""

import math

import torch
from cases import dense_outputs, loudness
from torch import Tensor

from smoothie_kernels import noise
from smoothie_kernels.ops import NearestToken, SmoothieStep
from smoothie_kernels.testing import FLOOR, compare, compare_step, compare_topk
from smoothie_kernels.topk import TopK


def differs(name, found, exact, bound):
    found, exact = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (found, exact))
    if found.shape != exact.shape:
        return [f"{name} has shape {list(found.shape)}, not {list(exact.shape)}"]
    compared = compare(name, (found - exact).abs(), bound)
    return [str(compared)] * compared.wrong


def field(args, rows, cols):
    """float64, and how loud."""
    ids = args.get("row_ids")
    ids = torch.arange(rows) + int(args.get("row_offset", 0)) if ids is None else ids.flatten()
    offsets, weights = args["offset"], args.get("field_weights")
    if weights is None:
        offsets, weights = [offsets], [1.0]
    pairs = [(float(w), int(offset)) for w, offset in zip(weights, offsets, strict=True)]
    eps = sum(w * noise.normals(ids, 0, cols, int(args["seed"]), offset) for w, offset in pairs)
    return eps, loudness(w for w, _ in pairs)


def sums_of(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(value, shape, dtype):
    value = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    return value.to(dtype).expand(shape).reshape(-1)


def wrong_step(call, args, outputs, incoming, gradients):
    """`gradients` takes, by name, exact ones, naive ones and a bound that is not relative."""
    x, table = args["x"], args["embeddings"]
    shape, (v, d) = x.shape[:-1], table.shape
    n, dtype = math.prod(shape), sums_of(x)
    step = SmoothieStep(*outputs[:4], TopK(*outputs[4:]) if outputs[4:] else None)
    k, smooth = int(args.get("topk") or 0), args.get("smooth", "full")
    wanted = [(x.shape, x.dtype), *[(shape, torch.int64)] * 2, (shape, dtype)]
    wanted += [((*shape, k), dtype), ((*shape, k), torch.int64), (shape, dtype)] * (k > 0)
    found = [(t.shape, t.dtype) for t in outputs]
    if found != wanted:
        return [f"shapes and types are {found}, not {wanted}"]
    if n == 0:
        gradients.append(([torch.zeros_like(args[name]) for name in call.leaves],) * 2 + (0.0,))
        return []
    mu, std = (rows_of(args[name], shape, dtype) for name in ("mu", "std"))
    (eps, loud), sigma_min = field(args, n, v), float(args["sigma_min"])
    given = x.reshape(n, d), table, mu, std, eps, sigma_min
    flat = SmoothieStep(outputs[0].view(n, d), *(t.view(n) for t in outputs[1:4]))
    compared = [c for c in compare_step(flat, *given, loudness=loud) if c.name != "smoothed"]
    indices = step.topk.indices.view(n, k) if k else None
    if k:
        topk = TopK(step.topk.values.view(n, k), indices, step.topk.tail_mass.view(n))
        recall = 1.0 if float(args["recall_target"]) == 1 or v < 128 else 0.0
        compared += compare_topk(topk, *given, recall=recall, loudness=loud)
    wrong = [str(c) for c in compared if c.wrong]
    if wrong:
        return wrong

    def dense(dtype):
        leaves = [t.to(dtype).clone().detach().requires_grad_() for t in given[:2]]
        made = dense_outputs(*leaves, *(t.to(dtype) for t in given[2:5]), indices, smooth, sigma_min)
        by_position = dict(zip((0, 3, 4, 6), made, strict=True))
        if not call.leaves:
            return made[0].detach(), []
        outs = [by_position[i] for i in incoming]
        into = [g.to(dtype).reshape(o.shape) for g, o in zip(incoming.values(), outs, strict=True)]
        names = [["x", "embeddings"].index(name) for name in call.leaves]
        found = torch.autograd.grad(outs, [leaves[i] for i in names], into, allow_unused=True)
        found = [torch.zeros_like(leaves[i]) if g is None else g for i, g in zip(names, found, strict=True)]
        return made[0].detach(), [g.view(args[name].shape) for g, name in zip(found, call.leaves, strict=True)]

    (exact, grads), (naive, naive_grads) = dense(torch.float64), dense(dtype)
    norms = table.double().norm(dim=1).max(), x.double().norm(dim=-1).max()
    reach = float((mu.double().abs().max() / sigma_min**2) * sum(norms))  # of a logit, by a move of x or of a token
    loud = max(1.0, loud * float(std.max()))
    beside = float(norms[0]) * (1 + reach * float(norms[0]) * (smooth == "topk+mean"))  # the sizes of what is added
    off = float((naive.double() - exact).abs().max())
    floor = FLOOR[x.dtype] * loud * beside + 2**-24
    wrong = differs("smoothed", flat.smoothed, exact, floor + 2 * off)
    total = sum(float(g.double().abs().sum()) for g in incoming.values())
    slope = 1 + (1 + beside) * reach * (1 + reach * float(norms[0]) * (smooth == "topk+mean"))
    gradients.append((grads, naive_grads, total * slope * loud))
    return wrong


def wrong_nearest(args, outputs):
    x, table = args["x"].double(), args["embeddings"].double()
    tokens, distance = NearestToken(*outputs)
    if (tokens.shape, tokens.dtype, distance.dtype) != (x.shape[:-1], torch.int64, sums_of(args["x"])):
        return [f"tokens are {tokens.dtype}{list(tokens.shape)}, distance is {distance.dtype}"]
    rows = x.reshape(-1, x.shape[-1])
    squared = (rows[:, None] - table).square().sum(-1)
    chosen = squared.gather(1, tokens.reshape(-1, 1))[:, 0]
    tie = 1e-5 * (rows.square().sum(1) + squared.amin(1)).clamp_min(1e-30)
    relative = 4e-6 if distance.dtype == torch.float32 else 1e-13
    return [
        *differs("distance", distance.reshape(-1), chosen, relative * chosen + 1e-37),
        *differs("the token's distance", chosen, squared.amin(1), tie),
    ]


def wrong_vocabulary(args, outputs):
    bias, mean, covariance, rows = outputs
    table = args["embeddings"].double()
    features = torch.cat((table, -table.square().sum(1, keepdim=True) / 2), 1)
    centred = table - table.mean(0)
    exact = (features - features.mean(0)).T @ centred / len(table)
    relative = 1e-14 if args["embeddings"].dtype == torch.float64 else 2e-6
    sizes = features.abs().T @ centred.abs() / len(table) + features.abs().amax(0)[:, None] * table.abs().amax()
    return [
        *differs("bias", bias, features[:, -1], 2**-23 * features[:, -1].abs()),
        *differs("the mean", mean, table.mean(0), relative * table.abs().amax()),
        *differs("the covariance", covariance, exact, relative * sizes),
        *differs("embeddings", rows, table, 0.0),
    ]


def exact_recall(V, K, buckets, keep):
    kept = 0
    for size, count in ((V // buckets, buckets - V % buckets), (V // buckets + 1, V % buckets)):
        for r in range(min(size, K) + 1 if count else 0):
            kept += count * min(r, keep) * math.comb(size, r) * math.comb(V - size, K - r)
    return kept / (K * math.comb(V, K))


def wrong_tokens(args, outputs):
    tokens, table, (smoothed,) = args["tokens"], args["embeddings"], outputs
    if smoothed.shape != (*tokens.shape, table.shape[1]) or smoothed.dtype != table.dtype:
        return [f"smoothed is {smoothed.dtype}{list(smoothed.shape)}"]
    mu, std = (m[..., None].expand(tokens.shape).flatten() for m in args["schedule"].marginal(args["t"]))
    dtype, n = sums_of(table), tokens.numel()
    eps, _ = field(args, n, len(table))
    x = table[tokens.flatten()]

    def dense(dtype):
        return dense_outputs(*(t.to(dtype) for t in (x, table, mu, std, eps)), None, "full", 1.5)[0]

    exact, kept = dense(torch.float64), args.get("mask", torch.ones_like(tokens)).flatten()[:, None] != 0
    naive = (dense(dtype).double() - exact).abs().max() if n else 0.0
    bound = FLOOR[table.dtype] * max(1, float(std.max())) * table.double().norm(dim=1).max() if n else 0.0
    return differs("smoothed", smoothed.flatten(0, -2), exact.where(kept, 0), bound + 2 * naive + 2**-24)


def what_is_wrong(call, outputs, incoming, grads):
    args, samples = call.args, 1
    if call.function == "recall":
        exact = exact_recall(**{name: int(value) for name, value in args.items()})
        return differs("recall", outputs[0], exact, 1e-12 * int(args["V"]) * exact)
    if call.function == "gaussian":
        eps, loud = field(args, int(args["rows"]), int(args["cols"]))
        return differs("the field", outputs[0], eps, 5e-5 * loud)
    if call.function == "vocabulary":
        return wrong_vocabulary(args, outputs)
    if call.function == "tokens":
        return wrong_tokens(args, outputs)
    samples = len(outputs[0]) if call.batched else 1
    wrong, gradients = [], []
    for i in range(samples):
        of = args | {name: args[name].select(dim, i) for name, dim in call.batched.items()}
        own = [o[i] for o in outputs] if call.batched else outputs
        into = {position: g[i] for position, g in incoming.items()} if call.batched else incoming
        wrong += wrong_nearest(of, own) if call.function == "nearest" else wrong_step(call, of, own, into, gradients)
    if wrong or not call.leaves:
        return wrong
    floor = max(FLOOR[args[name].dtype] for name in ("x", "embeddings"))
    for position, (name, grad) in enumerate(zip(call.leaves, grads, strict=True)):
        exact, naive = ([of_sample[which][position].double() for of_sample in gradients] for which in (0, 1))
        exact, naive = (
            torch.stack(each, call.batched[name]) if name in call.batched else sum(each) for each in (exact, naive)
        )
        size = float(exact.norm()) + 0.25 * sum(of_sample[2] for of_sample in gradients)
        bound = floor * size + 2 * float((naive - exact).norm()) + 2**-24 * grad.numel() ** 0.5
        wrong += [f"gradient of {name} is {grad.dtype}"] * (grad.dtype != args[name].dtype)
        wrong += differs(f"gradient of {name}", grad, exact, bound)
    return wrong
