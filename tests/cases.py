"""Inputs that every backend is tried on, forward and backward."""

import torch

VARIANCE = 1.5**2  # sigma_min^2, where none is given: a backend's scale is mu over it

# id: N, V, D, mu, std, x scale
CASES = {
    "even": (32, 256, 64, 0.05, 0.99, 1.0),
    "ragged": (33, 301, 48, 0.02, 1.0, 1.0),
    "odd": (7, 131, 37, 0.1, 0.9, 1.0),
    "one row": (1, 259, 24, 0.3, 0.95, 1.0),
    "one token": (5, 1, 16, 0.05, 0.99, 1.0),
    "two tokens": (17, 2, 8, 0.5, 0.5, 1.0),
    "width 1": (9, 130, 1, 0.5, 0.9, 1.0),
    "width 3": (18, 127, 3, 0.5, 0.9, 1.0),
    "many rows": (300, 140, 24, 0.1, 0.9, 1.0),
    "peaked": (16, 512, 64, 0.684, 0.73, 1.0),
    "flat": (16, 512, 64, 7e-5, 1.0, 1.0),
    "no noise": (20, 300, 32, 0.1, 0.0, 1.0),
    "no distances": (8, 200, 16, 0.0, 1.0, 1.0),
    "far away": (20, 150, 16, 0.3, 0.9, 1e2),
    "very far away": (5, 150, 16, 0.684, 0.73, 1e3),
    "loud": (20, 300, 32, 0.05, 30.0, 1.0),
    "very loud": (5, 300, 32, 0.05, 1e4, 1.0),
    "attracted by distance": (5, 90, 16, -0.4, 0.9, 1.0),
}

# id: offsets, field_weights, std. Words of 64 bits, negative and equal ones among them; weights of either sign, zero.
FIELDS = {
    "one": ([2**40 + 1], [0.7], 0.99),
    "two": ([1, 2**32 + 1], [0.6, -0.8], 0.99),
    "seven": ([-5, 0, 2**64 - 7, 3, 3, -(2**63), 2**32], [0.3, 0.0, -0.9, 0.5, 0.5, 1.1, -0.2], 0.9),
    "loud": ([0, 1, 2], [-1.5, 4.0, 2.0], 30.0),
    "nothing": ([0, 1], [0.0, 0.0], 0.9),
}


def loudness(field_weights):
    return sum(map(abs, field_weights))


def words_of(seed: int, offset: int, device: str) -> list[torch.Tensor]:
    return [torch.tensor(word, dtype=torch.int64, device=device) for word in (seed, offset)]


def inputs(n, v, d, scale, device, dtype=torch.float32):
    table = torch.randn(v, d)
    x = table[torch.randint(v, (n,))] + 0.3 * torch.randn(n, d)
    return (scale * x).to(device, dtype), table.to(device, dtype)


def dense_outputs(x, table, mu, std, eps, indices, smooth, sigma_min=1.5):
    """smoothed, lse and, of the tokens `indices` [N, K], values and tail_mass: dense, for autograd, in one type."""
    squared = x.square().sum(1)[:, None] - 2 * x @ table.T + table.square().sum(1)
    logits = mu[:, None] * squared / (-2 * sigma_min**2) + std[:, None] * eps
    lse, mean = logits.logsumexp(1), logits.softmax(1) @ table
    if indices is None:
        return mean, lse, None, None
    values, tail = logits.gather(1, indices), 1 - logits.softmax(1).gather(1, indices).sum(1)
    if smooth == "topk":
        mean = (values.softmax(1)[:, None] @ table[indices])[:, 0]
    if smooth == "topk+mean":
        weights = (values - lse[:, None]).exp()
        free = mu[:, None] / sigma_min**2 * (x @ table.T - table.square().sum(1) / 2)
        others = table.mean(0) + free @ (table - table.mean(0)) / len(table)
        mean = (weights[:, None] @ table[indices])[:, 0] + tail[:, None] * others
    return mean, lse, values, tail
