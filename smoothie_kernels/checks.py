"""Every rule on input and its message. Shapes, types and devices here, values in library.py."""

import ctypes
import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.nn import UninitializedBuffer, UninitializedParameter

from smoothie_kernels import words
from smoothie_kernels.stream import sum_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REAL = (*DTYPES, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
METRICS = ("euclidean", "cosine")
SMOOTH = ("full", "topk", "topk+mean")
MAX_ROW_ID = 2**32
# The square of sigma_min, and one over it, are float32's normal numbers.
SIGMA_MIN = (2.0**-63, 2.0**63)
# std sum(|field_weights|): logits then stay below 2**27, where float32 rounds one and its reference by 4 each at most;
# the CPU kernel's last pass bears 20 (csrc/cpu/step_fwd.h).
LOUDEST = 2.0**24
DEVICES = ("cpu", "cuda")  # PyTorch calls AMD's GPUs "cuda" as well
OFFSETS = "an int or a 0-d int64 tensor, or several: a sequence of ints or a 1-d int64 tensor"


def _number(name: str, value: object, wanted: str = "a number") -> float:
    if type(value) in (float, torch.SymInt, torch.SymFloat):  # symbolic numbers stay symbolic
        return cast(float, value)
    # NumPy registers its scalars as Real and Integral.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be {wanted}, got {_kind(value)}")
    try:
        if isinstance(value, int) and abs(value) > 2**1023:
            raise OverflowError
        # A compiler's numbers may stand for symbols.
        return value if torch.compiler.is_compiling() and isinstance(value, int | float) else float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a number beyond float64") from None


def integer(name: str, value: object, wanted: str = "an int") -> int:
    if type(value) is torch.SymInt:
        return cast(int, value)
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name} must be {wanted}, got {_kind(value)}")
    number = int(value)
    if not -(2**64) < number < 2**64:
        got = str(number) if number.bit_length() < 200 else f"one of {number.bit_length()} bits"
        raise ValueError(f"{name} must fit in 64 bits, got {got}")
    return number


def _kind(value: object) -> str:
    if not isinstance(value, Tensor) or _is_lazy(value):
        return type(value).__name__
    if value.is_nested or value.is_quantized:
        return f"{'nested' if value.is_nested else 'quantized'} tensor"
    return f"{value.dtype} tensor" if value.layout == torch.strided else f"{value.dtype} tensor of {value.layout}"


def _is_lazy(value: object) -> bool:
    """Whether it has no shape yet; torch.nn.parameter.is_lazy does not compile."""
    return isinstance(value, UninitializedParameter | UninitializedBuffer)


def _plain(name: str, value: object, wanted: str = "a tensor") -> Tensor:
    """A dense tensor, no subclass that wraps others, on a device that backends know."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {wanted}, got {_kind(value)}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized or _is_lazy(value):
        raise TypeError(f"{name} must be a dense tensor, got {_kind(value)}")
    if torch.compiler.is_compiling():
        return value
    kind = type(value)
    of_torch = kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or kind.__module__.startswith("torch._subclasses")
    if not of_torch:
        raise TypeError(f"{name} must be a plain tensor, got {kind.__name__}")
    for each in _within(value):
        if _has_tangent(each):
            raise NotImplementedError(f"{name} must have no tangent: smoothie_kernels has no forward-mode derivatives")
        if functorch.is_gradtrackingtensor(each) and each.requires_grad:
            raise NotImplementedError(
                f"{name} must not be differentiated by torch.func: PyTorch's custom operators have no rule for its "
                "grad, vjp and jacrev (pytorch/pytorch#170834). Use torch.autograd.grad"
            )
    return value


def _within(value: Tensor) -> Iterator[Tensor]:
    """It, and what transforms of torch.func have wrapped."""
    yield value
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
        yield value


def _has_tangent(value: Tensor) -> bool:
    if forward_ad._current_level < 0 or functorch.is_batchedtensor(value):  # what is batched may have one
        return False
    return forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def _shape(shape: torch.Size) -> str:
    return f"[{', '.join(str(n) for n in shape)}]"


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_backend(backend: object) -> None:
    _choice("backend", backend, BACKENDS)


def _float_tensor(name: str, value: object) -> Tensor:
    value = _plain(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def check_device(name: str, device: torch.device) -> None:
    if device.type not in DEVICES:
        raise ValueError(f"{name} must be on a CPU or a CUDA device, got {device}")


def as_device(name: str, value: torch.device | str | int) -> torch.device:
    try:
        device = torch.device(value)
    except (TypeError, RuntimeError, ValueError):
        raise ValueError(f"{name} must be a device that PyTorch knows, got {value!r}") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"{name} must be on this machine, which has {torch.cuda.device_count()} GPUs, got {device}")
    return device


def check_table(embeddings: object) -> None:
    embeddings = _float_tensor("embeddings", embeddings)
    check_device("embeddings", embeddings.device)
    shape = embeddings.shape
    if len(shape) != 2:
        raise ValueError(f"embeddings must have shape [V, D], got {_shape(shape)}")
    if shape[0] == 0 or shape[1] == 0:
        raise ValueError(f"embeddings must have at least one row and one column, got {_shape(shape)}")
    if shape[0] >= 2**31:
        raise ValueError(f"embeddings must have fewer than 2**31 rows, got {shape[0]}")


def check_metric(metric: object, embeddings: Tensor) -> str | Tensor:
    if isinstance(metric, str):
        _choice("metric", metric, METRICS)
        return metric
    wanted = f"one of {', '.join(map(repr, METRICS))}, or a (D, D) tensor"
    factor, d = _plain("metric", metric, wanted), embeddings.shape[1]
    if factor.dtype not in DTYPES:
        raise TypeError(f"metric must be {wanted} of floats, got {_kind(factor)}")
    if factor.shape != (d, d):
        raise ValueError(f"metric must have shape [D, D] with D = {d} as in embeddings, got {_shape(factor.shape)}")
    if factor.device != embeddings.device:
        raise ValueError(f"metric must be on the device of embeddings, {embeddings.device}, got {factor.device}")
    if functorch.is_batchedtensor(factor):
        raise NotImplementedError("smoothie_kernels takes one metric for all samples of torch.func.vmap")
    if factor.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values("metric", factor.detach(), sum_dtype(embeddings))
    return factor


def check_x(x: object, embeddings: Tensor) -> None:
    x = _float_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] != embeddings.shape[1]:
        raise ValueError(
            f"x must have shape [..., D] with D = {embeddings.shape[1]} as in embeddings, got {_shape(x.shape)}"
        )
    if x.device != embeddings.device:
        raise ValueError(f"x must be on the device of embeddings, {embeddings.device}, got {x.device}")
    if (x.dtype == torch.float64) != (embeddings.dtype == torch.float64):
        raise TypeError(f"x and embeddings must both be float64 or neither, got {x.dtype} and {embeddings.dtype}")


def check_topk(topk: object, recall_target: object, smooth: object, vocabulary: int) -> int:
    """`topk` as a number, 0 for None."""
    _choice("smooth", smooth, SMOOTH)
    target = _number("recall_target", recall_target)
    if not 0 < target <= 1:
        raise ValueError(f"recall_target must be in (0, 1], got {target}")
    if topk is None:
        if target != 1:
            raise ValueError(f"recall_target must be 1.0 where topk is None, got {target}")
        if smooth != "full":
            raise ValueError(f"smooth must be 'full' where topk is None, got {smooth!r}")
        return 0
    return one_to_v("topk", topk, vocabulary, "an int or None")


def check_smooth(smooth: str, metric: str | Tensor) -> None:
    if smooth == "topk+mean" and (isinstance(metric, Tensor) or metric != "euclidean"):
        raise ValueError("smooth must be 'full' or 'topk' where distances are not Euclidean, got 'topk+mean'")


def one_to_v(name: str, value: object, vocabulary: int, wanted: str = "an int") -> int:
    number = integer(name, value, wanted)
    if not 1 <= number <= vocabulary:
        raise ValueError(f"{name} must be in [1, V] with V = {vocabulary}, got {number}")
    return number


def scale(mu: object, sigma_min: object, x: Tensor) -> Tensor:
    """mu / sigma_min^2, one number per row; shape (N,)."""
    number, (low, high) = _number("sigma_min", sigma_min), SIGMA_MIN
    if torch.compiler.is_compiling():  # a comparison would fix the number; the operator finds what is not a number
        sigma = torch.ones((), dtype=torch.float64, device=x.device) * number
        return per_row("mu", mu, x) / torch.where((sigma >= low) & (sigma <= high), sigma * sigma, math.nan)
    if not 0 < number < math.inf:
        raise ValueError(f"sigma_min must be positive and finite, got {number}")
    if not low <= number <= high:
        raise ValueError(f"sigma_min must be in [2**-63, 2**63], got {number}")
    if isinstance(mu, Tensor):
        return per_row("mu", mu, x) / number**2
    value = _number("mu", mu, "a number or a tensor")
    check_values("mu", value, sum_dtype(x))
    if x.dtype != torch.float64:
        value = ctypes.c_float(value).value  # as a tensor has it
    return per_row("mu / sigma_min**2", value / number**2, x)


def _filled(shape: tuple[int, ...], number: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if torch.compiler.is_compiling():  # in a product a number that changes from call to call becomes a symbol
        return torch.ones(shape, dtype=dtype, device=device) * number
    return torch.full(shape, number, dtype=dtype, device=device)


def per_row(name: str, value: object, x: Tensor) -> Tensor:
    """`value`, a number or a tensor that broadcasts to the rows of x, as one number per row; shape (N,)."""
    dtype, rows = sum_dtype(x), x.shape[:-1]
    if isinstance(value, Tensor):
        value = _small(name, value)
        if value.dtype not in REAL:
            raise TypeError(f"{name} must be a real number or tensor, got {_kind(value)}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require grad: the step has no gradient for it")
        if value.dim() == 0:
            check_device(name, value.device)
        elif value.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
        if value.dim() > len(rows) or any(v not in (1, n) for v, n in zip(value.shape[::-1], rows[::-1], strict=False)):
            raise ValueError(f"{name} must broadcast to x.shape[:-1] = {_shape(rows)}, got {_shape(value.shape)}")
        return value.to(device=x.device, dtype=dtype).expand(rows).reshape(math.prod(rows))
    number = _number(name, value, "a number or a tensor")
    if not torch.compiler.is_compiling():  # a comparison would fix the number; on a CPU the operator looks again
        check_values(name, number, dtype)
    return _filled((math.prod(rows),), number, dtype, x.device)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {_kind(value)}")


def count(name: str, value: object) -> int:
    number = integer(name, value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    if number >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {number}")
    return number


def check_values(name: str, value: float | Tensor, dtype: torch.dtype = torch.float64) -> float:
    """The largest magnitude. All must be finite, also in `dtype`, and std not negative."""
    low, high = (float(value.min()), float(value.max())) if isinstance(value, Tensor) else (value, value)
    if not -math.inf < low <= high < math.inf:  # NaN compares false
        raise ValueError(f"{name} must be finite, got {high if -math.inf < low else low}")
    if name == "std" and low < 0:
        raise ValueError(f"std must not be negative, got {low}")
    magnitude = max(-low, high)
    if magnitude > torch.finfo(dtype).max:
        raise ValueError(f"{name} must be finite in {dtype}, got {low}")
    return magnitude


def check_logits(scale: Tensor, std: Tensor | None, field_weights: Tensor | None) -> float:
    """The values of what makes logits, alone and together; gives the largest std."""
    check_values("mu / sigma_min**2", scale)
    if field_weights is not None:
        check_values("field_weights", field_weights)
    if std is None:
        return 0.0
    largest = check_values("std", std)
    loudness, of_fields = largest, ""
    if field_weights is not None:
        loudness, of_fields = loudness * float(field_weights.abs().sum()), " times the sum of |field_weights|"
    if loudness > LOUDEST and std.dtype == torch.float32:
        raise ValueError(f"std{of_fields} must be at most 2**24 in float32, got {loudness:.3g}")
    return largest


def check_row_ids(row_ids: object, row_offset: object, x: Tensor) -> tuple[Tensor | None, int]:
    """`row_ids` as int64 of shape (N,) or None, and `row_offset`."""
    first, rows = integer("row_offset", row_offset), x.shape[:-1]
    # The operator looks again: under a compiler a comparison could fix the number of rows.
    check_row_offset(first, 0 if torch.compiler.is_compiling() else math.prod(rows))
    if row_ids is None:
        return None, first
    row_ids = _small("row_ids", row_ids, "an int64 tensor")
    if row_ids.dtype != torch.int64:
        raise TypeError(f"row_ids must be an int64 tensor, got {_kind(row_ids)}")
    if first != 0:
        raise ValueError(f"row_offset must be 0 where row_ids are given, got {first}")
    if row_ids.shape != rows:
        raise ValueError(f"row_ids must have the shape of x.shape[:-1], {_shape(rows)}, got {_shape(row_ids.shape)}")
    if row_ids.device != x.device:
        raise ValueError(f"row_ids must be on the device of x, {x.device}, got {row_ids.device}")
    return row_ids.reshape(math.prod(rows)), first


def check_row_offset(first: int, count: int) -> None:
    if first < 0 or first + count > MAX_ROW_ID:
        raise ValueError(f"row_offset must keep row ids in [0, 2**32), got {first} with {count} rows")


def check_row_id_values(row_ids: Tensor) -> None:
    low, high = int(row_ids.min()), int(row_ids.max())
    if low < 0 or high >= MAX_ROW_ID:
        raise ValueError(f"row_ids must be in [0, 2**32), got {low if low < 0 else high}")


def check_finite_table(bias: Tensor) -> None:
    """The bias holds every row's squared norm: it is finite where the table is."""
    finite = torch.isfinite(bias)
    if not bool(finite.all()):
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"embeddings must be finite, with squared norms that float32 holds; row {row} is not")


def check_can_be_saved(x: Tensor, embeddings: Tensor, metric: str | Tensor) -> None:
    """Autograd cannot keep an inference tensor for the backward pass."""
    learned = isinstance(metric, Tensor) and metric.requires_grad
    if not (learned or x.requires_grad or embeddings.requires_grad):
        return
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for name, value in (("x", x), ("embeddings", embeddings), ("metric", metric)):
        if isinstance(value, Tensor) and value.is_inference():
            raise ValueError(f"{name} must not be made in torch.inference_mode where a gradient is needed, but it was")


def _small(name: str, value: object, wanted: str = "a tensor") -> Tensor:
    """A plain tensor with a number for each row, or fewer; of an inference tensor a copy, which autograd can keep."""
    value = _plain(name, value, wanted)
    copied = not torch.compiler.is_compiling() and value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if copied else value


def word(name: str, value: object, wanted: str = "an int or a 0-d int64 tensor") -> Tensor:
    """`value` as a 0-d int64 tensor: 64 bits, in two's complement from 2**63 on."""
    if isinstance(value, Tensor):
        value = _small(name, value)
        if value.dtype != torch.int64 or value.dim() != 0:
            raise TypeError(f"{name} must be {wanted}, got {_kind(value)} of shape {_shape(value.shape)}")
        check_device(name, value.device)
        return value
    bits = integer(name, value, wanted)
    if not -(2**63) <= bits < 2**64:
        raise ValueError(f"{name} must fit in 64 bits, got {bits}")
    return words.word(bits)


def noise_fields(offset: object, field_weights: object, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`offset` as int64 [F] and `field_weights` as [F] in the type of x's sums, None for one field as it is."""
    if not (_several(offset) or (isinstance(offset, Tensor) and not offset.is_nested and offset.dim() == 1)):
        one = word("offset", offset, OFFSETS).reshape(1)
        if field_weights is not None:
            raise ValueError(f"field_weights must be None where offset is one, got {_kind(field_weights)}")
        return one, None
    if isinstance(offset, Tensor):
        offset = _small("offset", offset)
        if offset.dtype != torch.int64:
            raise TypeError(f"offset must be {OFFSETS}, got {_kind(offset)} of shape {_shape(offset.shape)}")
        check_device("offset", offset.device)
        offsets = offset
    else:
        one_by_one = [word("offset", each, OFFSETS) for each in cast(Sequence[object], offset)]
        offsets = torch.stack(one_by_one) if one_by_one else torch.empty(0, dtype=torch.int64, device="cpu")
    fields = offsets.shape[0]  # len() would fix it in an exported graph
    if fields == 0:
        raise ValueError("offset must have at least one entry, got none")
    if field_weights is None:
        raise ValueError(f"field_weights must be given where offset is several, got None for {_kind(offset)}")
    return offsets, _field_weights(field_weights, fields, x)


def _several(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _field_weights(value: object, count: int, x: Tensor) -> Tensor:
    dtype, wanted = sum_dtype(x), "a sequence of numbers or a 1-d tensor"
    if isinstance(value, Tensor):
        value = _small("field_weights", value)
        if value.dtype not in DTYPES:
            raise TypeError(f"field_weights must be {wanted} of floats, got {_kind(value)}")
        if value.requires_grad:
            raise ValueError("field_weights must not require grad: the step has no gradient for it")
        if value.shape != (count,):
            raise ValueError(f"field_weights must have shape [{count}] as offset has, got {_shape(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"field_weights must be on the device of x, {x.device}, got {value.device}")
        return value.to(dtype)
    if not _several(value):
        raise TypeError(f"field_weights must be {wanted}, got {_kind(value)}")
    value = cast(Sequence[object], value)
    if len(value) != count:
        raise ValueError(f"field_weights must have {count} entries as offset has, got {len(value)}")
    weights = [_number("field_weights", each, "numbers") for each in value]
    if not torch.compiler.is_compiling():
        for weight in weights:
            check_values("field_weights", weight, dtype)
    return torch.stack([_filled((), weight, dtype, "cpu") for weight in weights])
