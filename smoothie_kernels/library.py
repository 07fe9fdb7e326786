"""The operators as PyTorch knows them: schema, fake kernels and the one implementation that calls a backend.

Values of tensors are checked from here, because this code runs on real tensors also under torch.compile.
On a GPU they are not: reading them would make the host wait for the device.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from smoothie_kernels import checks
from smoothie_kernels.dispatch import pick_backend


@custom_op("smoothie_kernels::column_bias", mutates_args=())
def column_bias(embeddings: Tensor, check_finite: bool, backend: str) -> Tensor:
    bias: Tensor = pick_backend(backend, embeddings.device, embeddings.dtype).column_bias(embeddings)
    if check_finite:
        checks.check_finite_table(bias)
    return bias


@column_bias.register_fake
def _(embeddings: Tensor, check_finite: bool, backend: str) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=_sum_dtype(embeddings))


@custom_op("smoothie_kernels::step_fwd", mutates_args=())
def step_fwd(
    x: Tensor,  # [N, D]
    embeddings: Tensor,  # [V, D], rows contiguous
    bias: Tensor,  # [V]
    mu: Tensor,  # [N]
    std: Tensor,  # [N]
    row_ids: Tensor | None,  # [N], instead of row_offset + i
    seed: Tensor,  # []
    offset: Tensor,  # []
    row_offset: int,
    sigma_min: float,
    has_noise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        return _empty_step(x)
    if x.device.type == "cpu":
        checks.check_values("mu", mu)
        checks.check_values("std", std)
        if row_ids is not None:
            checks.check_row_id_values(row_ids)
    chosen = pick_backend(backend, x.device, x.dtype)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = chosen.step_fwd(
        x.contiguous(), embeddings, bias, mu.contiguous(), std.contiguous() if has_noise else None,
        None if row_ids is None else row_ids.contiguous(), row_offset, seed, offset, sigma_min,
    )  # fmt: skip
    return outputs


@step_fwd.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_step(x)


def _empty_step(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = x.shape[0]
    tokens = [x.new_empty(n, dtype=torch.int64) for _ in range(2)]
    return x.new_empty(x.shape), tokens[0], tokens[1], x.new_empty(n, dtype=_sum_dtype(x))


@custom_op("smoothie_kernels::nearest_fwd", mutates_args=())
def nearest_fwd(x: Tensor, embeddings: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return _empty_nearest(x)
    outputs: tuple[Tensor, Tensor] = pick_backend(backend, x.device, x.dtype).nearest_fwd(
        x.contiguous(), embeddings, bias
    )
    return outputs


@nearest_fwd.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_nearest(x)


def _empty_nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=_sum_dtype(x))


@custom_op("smoothie_kernels::gaussian", mutates_args=())
def gaussian(
    like: Tensor, cols: int, row_ids: Tensor | None, seed: Tensor, offset: Tensor, row_offset: int, backend: str
) -> Tensor:  # like: [N, 0], for the number of rows and the device
    out = like.new_empty(like.shape[0], cols)
    if out.numel() == 0:
        return out
    if row_ids is not None and like.device.type == "cpu":
        checks.check_row_id_values(row_ids)
    field: Tensor = pick_backend(backend, like.device, torch.float32).gaussian(
        out, None if row_ids is None else row_ids.contiguous(), row_offset, seed, offset
    )
    return field


@gaussian.register_fake
def _(like: Tensor, cols: int, *_: object) -> Tensor:
    return like.new_empty(like.shape[0], cols)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
