"""Random calls for fuzz.py: a function, its arguments, which of them are at fault, and what surrounds the call."""

import contextlib
import math
import random
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, func

from smoothie_kernels import dispatch
from smoothie_kernels.diffusion import make_schedule

SIZES = [0, 1, 2, 2, 3, 3, 5, 17]
WIDTHS = [*range(1, 10), 16, 37]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HUGE = 10**400  # beyond float64
REFUSALS = ValueError, TypeError, NotImplementedError

# --- tensors of any layout, numbers of any kind


def laid_out(r, t):
    """The numbers of t, or some of them again and again, in memory that has NaN, or huge integers, around them."""
    junk = math.nan if t.is_floating_point() else 2**40
    kinds = ["as it is", "step", "window"]
    if t.numel() and t.dim():
        kinds += ["permuted", "wide", "expanded", "one number", "overlapping", "flipped"]
        kinds += ["negative"] * (t.dtype in (torch.float32, torch.float64)) + ["channels last"] * (t.dim() == 4)
    kind = r.choice(kinds)
    if kind == "step":
        return torch.stack((torch.full_like(t, junk), t), -1)[..., 1]
    if kind == "window":
        ahead = r.randint(1, 3)
        return torch.cat((t.new_full((ahead,), junk), t.flatten(), t.new_full((2,), junk)))[ahead:-2].view(t.shape)
    if kind == "permuted":
        order = r.sample(range(t.dim()), t.dim())
        return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])
    if kind == "wide":
        around = torch.full_like(t, junk)
        return torch.cat((around, t, around), -1)[..., t.shape[-1] : 2 * t.shape[-1]]
    if kind == "expanded":
        return t.narrow(r.randrange(t.dim()), 0, 1).expand(t.shape)
    if kind == "one number":
        return t.flatten()[0].expand(t.shape)
    if kind == "overlapping":
        return t.flatten().as_strided(t.shape, [1] * t.dim())
    if kind == "flipped":
        return t.flip(r.randrange(t.dim()))
    if kind == "negative":  # torch sets a mark instead of changing the signs in memory
        return torch.complex(torch.full_like(t, junk), -t).conj().imag
    return t.contiguous(memory_format=torch.channels_last) if kind == "channels last" else t


def number(r, value):
    kinds = [float, float, np.float64, np.float32, Fraction] + [int, np.int32] * (value == int(value))
    return r.choice(kinds)(value)


def integer(r, value):
    kinds = [int] * 3 + [np.int64] * (-(2**63) <= value < 2**63) + [np.uint64] * (0 <= value < 2**64)
    return r.choice(kinds)(value)


def signed(word):
    return (int(word) + 2**63) % 2**64 - 2**63


def word(r):
    """64 bits."""
    value = r.choice([0, 1, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), r.getrandbits(64)])
    return r.choice([value, integer(r, value), torch.tensor(signed(value))])


def per_row(r, rows, values):
    """A number, or a tensor that broadcasts to rows."""
    if r.random() < 0.4:
        return number(r, r.choice(values))
    shape = [n if r.random() < 0.7 else 1 for n in rows][r.randint(0, len(rows)) :]
    given = torch.tensor([r.choice(values) for _ in range(math.prod(shape))], dtype=torch.float64).view(shape)
    return laid_out(r, given.to(r.choice([*FLOATS, torch.float32, torch.float64])))


# --- what surrounds a call


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    **{f"autocast to {dtype}": lambda dtype=dtype: torch.autocast("cpu", dtype) for dtype in FLOATS[1:]},
    "meta by default": lambda: torch.device("meta"),
    **{f"{dtype} by default": lambda dtype=dtype: default_dtype(dtype) for dtype in (*FLOATS[1:], torch.float64)},
}
WITHOUT_GRADIENTS = {"no_grad", "inference_mode"}
HOWS = {"plain": 45, "gradients": 100, "batched gradients": 5, "vmap": 25, "func": 6, "twice": 3, "inference tensor": 6}

# --- draws: a function, its arguments, and which of them are at fault

WRONG = [None, "text", b"ab", object(), [1.0], {}, 1j, True, np.ones(2), torch.ones(2).to_sparse(), len]
OPTIONAL = {"seed", "field_weights", "row_ids", "topk", "device", "mask"}  # where None says something


class Call:
    def __init__(self, seed, index, compiled):
        self.r = random.Random(f"{seed} {index}")
        torch.manual_seed(self.r.getrandbits(32))
        self.args, self.faults, self.refusals = {}, set(), REFUSALS
        self.kept, self.leaves, self.batched, self.about = "bare", [], {}, None
        self.around = [name for name in AROUND if self.r.random() < 0.08]
        self.how = self.r.choices(list(HOWS), list(HOWS.values()))[0]
        if compiled and self.r.random() < 0.03:
            self.how = "compiled"
        self.function = self.r.choices(list(FUNCTIONS), [weight for _, weight in FUNCTIONS.values()])[0]
        FUNCTIONS[self.function][0](self)

    def fault(self, name, values, *others):
        """A bad value: one of these, or of a kind that nothing takes."""
        wrong = WRONG[1:] if name in OPTIONAL else WRONG
        self.args[name] = self.r.choice(wrong if self.r.random() < 0.3 else values)
        self.faults |= {name, *others}

    def __str__(self):
        def text(value):
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
                return repr(value).replace("\n", " ")[:60]
            view = f" by {list(value.stride())} from {value.storage_offset()}" if value.dim() else f" {value}"
            return f"{str(value.dtype)[6:]}{list(value.shape)}{view}{' negative' * value.is_neg()}"

        args = ", ".join(f"{name}={text(value)}" for name, value in self.args.items())
        rest = {"at fault": sorted(self.faults), "gradients of": self.leaves, "batched": self.batched}
        rest |= {"around": self.around, "about": self.about}
        return f"{self.function}({args}), {self.how}, " + ", ".join(f"{k} {v}" for k, v in rest.items() if v)


def draw_backend(call, dtype):
    names = ["cpu", "cpu"] + ["triton"] * (call.how != "compiled" and call.r.random() < 0.05)
    names = [name for name in names if not dispatch.load(name).supports("cpu", dtype)]
    call.args["backend"] = call.r.choice(["auto", "reference", *names])


def draw_table(call):
    """(V, D), and the type of x."""
    r = call.r
    of_table, of_x = r.choice([[torch.float32] * 2, [torch.float64] * 2, r.choices(FLOATS, k=2)])
    v, d = r.choice([1, 1, 2, 3, 5, 9, 37, 131, 131, 300]), r.choice(WIDTHS)
    call.args["embeddings"] = table = laid_out(r, torch.randn(v, d).to(of_table) * r.choice([1.0, 1.0, 0.1, 3.0]))
    if r.random() < 0.05:
        bad = table.clone()
        bad[r.randrange(v), r.randrange(d)] = r.choice([math.nan, math.inf, -math.inf])
        kinds = [table + 0j, table.to_sparse(), torch.nested.nested_tensor([table]), table.to("meta"), table.long()]
        call.fault("embeddings", [*kinds, bad, table[0], table[None], table[:0], table[:, :0]])
    return v, d, of_x


def draw_x(call, d, dtype):
    r, shape = call.r, [call.r.choice(SIZES) for _ in range(call.r.choice([0, 1, 1, 1, 2, 2, 3]))]
    call.shape = shape = shape if math.prod(shape) <= 40 else shape[:1]
    call.args["x"] = x = laid_out(r, torch.randn(*shape, d).to(dtype) * r.choice([1.0, 1.0, 0.1, 3.0]))
    if not call.faults and r.random() < 0.06:
        other = torch.float32 if dtype == torch.float64 else torch.float64
        kinds = [
            x + 0j,
            x.to_sparse(),
            torch.nested.nested_tensor([torch.ones(2, d)]),
            x.to("meta"),
            x.long(),
            x.bool(),
        ]
        call.fault("x", [*kinds, x.to(other), x.sum(), torch.randn(*shape, d + 1).to(dtype)])
    return math.prod(shape)


def draw_noise(call, rows, checked):
    """seed, offset, field_weights, row_offset or row_ids. Values of tensors are `checked` if anything is computed."""
    r, args, n = call.r, call.args, math.prod(rows)
    args |= {"seed": word(r), "offset": word(r)}
    if r.random() < 0.3:
        offsets = [word(r) for _ in range(r.randint(1, 3))]
        weights = [r.choice([0.5, -1.0, 0.0, 2.0]) for _ in offsets]
        args |= {"offset": r.choice([list, tuple])(offsets), "field_weights": [number(r, w) for w in weights]}
        if r.random() < 0.5:
            args["offset"] = laid_out(r, torch.tensor([signed(offset) for offset in offsets]))
            args["field_weights"] = laid_out(r, torch.tensor(weights).to(r.choice(FLOATS)))
    if r.random() < 0.5:
        args["row_offset"] = integer(r, r.choice([0, 5, 2**31, 2**32 - n]))
    elif r.random() < 0.7:
        ids = [r.choice([0, 1, 2**31, 2**32 - 1, r.getrandbits(32)]) for _ in range(n)]
        args["row_ids"] = laid_out(r, torch.tensor(ids, dtype=torch.int64).view(rows))
    if call.faults or r.random() > 0.2:
        return
    meta, ids = torch.tensor([1], device="meta"), torch.zeros(rows, dtype=torch.int64)
    which = r.choice(["seed", "offset", "field_weights", "row_offset", "row_ids"])
    if which == "seed":
        call.fault("seed", [2**64, -HUGE, 1.5, torch.tensor(1.0), torch.tensor([1]), meta[0]])
    elif which == "offset":
        args["field_weights"] = None
        call.fault("offset", [2**64, HUGE, 0.5, torch.tensor(1.0), meta, meta[0], ids[None, None], []])
    elif which == "field_weights":
        args["offset"] = r.choice([[1, 2], torch.tensor([1, 2]), 1])
        values = [[1.0, math.nan], [HUGE, 1.0], torch.tensor([math.inf, 1.0])][: 3 if checked else 2]
        kinds = [[1.0, "2"], torch.ones(3), torch.ones(2).long(), torch.ones(2, device="meta"), torch.ones(1, 2)]
        call.fault("field_weights", values + kinds)
    elif which == "row_offset":
        args["row_ids"] = None
        call.fault("row_offset", [-1, 2**32 - n + 1, 2**63, np.uint64(2**64 - 1), HUGE, -HUGE, 1.5])
    else:
        args["row_offset"] = 0
        values = [ids - 1, ids + 2**32, ids - 2**62] * checked
        call.fault("row_ids", [*values, ids.int(), ids[None], ids.double(), ids.to("meta")], "device")


def draw_step(call):
    r, args = call.r, call.args
    v, d, dtype = draw_table(call)
    n = draw_x(call, d, dtype)
    draw_backend(call, dtype)
    args["mu"] = per_row(r, call.shape, [0.0, 0.02, 0.3, -0.1])
    args["std"] = per_row(r, call.shape, [0.0, 0.5, 1.0, 3.0])
    args["sigma_min"] = number(r, r.choice([1.0, 1.5, 0.5, 4.0]))
    args["workspace"] = integer(r, r.choice([0, 2**10, 2**28, 2**63 - 1]))
    draw_noise(call, call.shape, n > 0)
    if r.random() < 0.5:
        args["topk"] = integer(r, r.choice([1, v, r.randint(1, v)]))
        args["smooth"] = r.choice(["full", "topk", "topk+mean"])
        args["recall_target"] = number(r, r.choice([1, 1, 0.75]))
    if not call.faults and r.random() < 0.25:
        ones, meta = torch.ones(call.shape), torch.ones((), device="meta")
        of_rows = [HUGE, -HUGE, Fraction(HUGE), math.nan, math.inf, ones + 0j, ones.bool(), torch.ones(2, *call.shape)]
        of_rows += [ones.clone().requires_grad_(), ones.to_sparse(), meta, torch.nested.nested_tensor([ones.view(-1)])]
        of_rows += [torch.tensor(math.nan), torch.full(call.shape, -math.inf)] * (n > 0)
        wrong = {
            "mu": of_rows,
            "std": [*of_rows, -1.0, -Fraction(1, 3)] + [torch.tensor(-1.0)] * (n > 0),
            "sigma_min": [0, -1.5, math.nan, math.inf, HUGE, torch.tensor(1.0), np.float32(0)],
            "topk": [0, -1, v + 1, HUGE, -(10**5000), 1.0, np.float32(1)],
            "smooth": ["", np.array(["full", "topk"])],
            "recall_target": [0, 1.5, -1, math.nan, HUGE, -HUGE],
            "workspace": [-1, 1e8, HUGE, -HUGE, 2**64],
            "backend": ["gpu", np.array(["cpu", "auto"])],
        }
        args.setdefault("topk", 1)
        name = r.choice(list(wrong))
        call.fault(name, wrong[name])
    elif not call.faults and n and dtype == torch.float64 and r.random() < 0.1:
        args["backend"], call.faults, call.refusals = "cpu", {"backend"}, (RuntimeError,)
    finish(call)


def finish(call):
    """Which gradients are asked for, and what faults the way of calling is."""
    r, args, step = call.r, call.args, call.function == "step"
    call.kept = r.choice(["bare", "bare", "vocabulary", "copied", "pickled", "of inference"])
    if call.how == "compiled":
        call.about = r.choice(["eager"] * 4 + ["aot_eager"] * 5 + ["inductor"]) if not call.faults else "eager"
    if call.faults or (call.how == "twice" and not step):
        call.how, call.kept = ("compiled" if call.how == "compiled" else "plain"), r.choice(["bare", "vocabulary"])
        return
    if (
        call.how in ("gradients", "batched gradients", "compiled", "twice", "vmap")
        and step
        and (call.how != "vmap" or r.random() < 0.8)
    ):
        call.leaves = r.choice([["x"], ["embeddings"], ["x", "embeddings"]])
    if call.how == "func":
        call.about, call.kept = r.choice(["x", "embeddings"]), "bare"
        around_vmap = r.random() < 0.3  # of one sample
        of = r.choice([func.grad, func.jacrev, func.jacfwd, func.hessian])
        call.transform = (lambda f: of(lambda t: func.vmap(f)(t[None]).sum())) if around_vmap else of
        call.faults = {call.about}
    elif call.how == "twice":
        call.leaves, call.faults = call.leaves or ["x"], {"fused_smoothie_step"}
    elif call.how == "inference tensor":
        call.about, other = r.choice([["x", "embeddings"], ["embeddings", "x"]])
        with torch.inference_mode():
            args[call.about] = args[call.about].clone(memory_format=torch.contiguous_format)
        if step and r.random() < 0.5:
            call.leaves, call.faults, call.kept = [other], {call.about}, "bare"
    elif call.how == "vmap":
        draw_samples(call)
    elif call.how == "compiled":
        plainly(args)
    if call.leaves or call.how == "func":
        call.around = [name for name in call.around if name not in WITHOUT_GRADIENTS]
    if "embeddings" in call.leaves and call.kept in ("copied", "pickled"):  # they have a leaf of their own
        call.kept = "vocabulary"


def plainly(args):
    """Python's numbers: torch.compile takes those of NumPy for arrays, and refuses others."""

    def plain(value):
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, np.generic | Fraction):
            return int(value) if value == int(value) else float(value)
        return value

    for name, value in args.items():
        args[name] = plain(value)


def draw_samples(call):
    """Some arguments get a dimension more, of one to three samples."""
    r, args, count = call.r, call.args, call.r.randint(1, 3)
    names = [name for name in ("x", "mu", "std", "row_ids") if isinstance(args.get(name), Tensor)]
    names = r.sample(names, r.randint(1, len(names)))
    if r.random() < 0.1:
        refused = r.choice([name for name in ("embeddings", "seed") if isinstance(args.get(name), Tensor)])
        names, call.faults, call.kept = [*names, refused], {refused}, "bare"
    elif r.random() < 0.05 and "seed" in args:
        args["seed"], call.faults = None, {"seed"}
    for name in names:
        value, dim = args[name], r.randint(0, args[name].dim())
        samples = [value] + [value.flip(0) if value.dim() else value for _ in range(count - 1)]
        args[name], call.batched[name] = laid_out(r, torch.stack(samples, dim)), dim


def draw_nearest(call):
    _, d, dtype = draw_table(call)
    draw_x(call, d, dtype)
    draw_backend(call, dtype)
    if not call.faults and call.r.random() < 0.05:
        call.fault("backend", ["gpu"])
    finish(call)


def draw_gaussian(call):
    r, args = call.r, call.args
    rows, cols = r.choice(SIZES), r.choice(SIZES)
    args |= {"rows": integer(r, rows), "cols": integer(r, cols)}
    draw_backend(call, torch.float32)
    draw_noise(call, [rows], rows * cols > 0)
    if "seed" in call.faults and r.random() < 0.1:
        args["seed"] = None
    if not call.faults and r.random() < 0.1:
        name, values = r.choice([
            ("rows", [-1, 1.0, HUGE, 2**63, 2**33]), ("cols", [-1, 1.0, HUGE, 2**63]),
            ("device", ["meta", "nonsense", 1.5, "cuda:77"]), ("backend", ["gpu"]),
        ])  # fmt: skip
        call.fault(name, values, *(["row_offset", "row_ids"] if name == "rows" else []))
    if call.how == "compiled" and not call.faults:
        call.about = "aot_eager"
        plainly(args)
    else:
        call.how = "plain"


def draw_vocabulary(call):
    draw_table(call)
    call.args |= {"backend": call.r.choice(["auto", "reference"]), "device": "cpu"}
    call.how, call.about = call.how if call.how == "compiled" else "plain", "aot_eager"
    if not call.faults and call.r.random() < 0.2:
        call.fault(*call.r.choice([("backend", ["gpu"]), ("device", ["nonsense", 1.5, "cuda:77"])]))


def draw_recall(call):
    r, call.how = call.r, "plain"
    v = r.choice([1, 2, 3, 10, 100, 131, 1000, 2**31 - 1])
    few = min(v, 300)
    drawn = {"V": v, "K": r.randint(1, few), "buckets": r.choice([r.randint(1, few), v]), "keep": r.randint(1, 5)}
    call.args = {name: integer(r, value) for name, value in drawn.items()}
    if r.random() < 0.3:
        name = r.choice(list(drawn))
        most = {"K": v + 1, "buckets": v + 1, "keep": 0, "V": 2**31}[name]
        call.fault(name, [0, -1, 1.0, HUGE if name != "keep" else -HUGE, most])


def draw_tokens(call):
    r, args = call.r, call.args
    v, *_ = draw_table(call)
    call.kept, call.how = r.choice(["bare", "vocabulary"]), "plain"
    table = args["embeddings"]
    draw_backend(call, table.dtype if isinstance(table, Tensor) else torch.float32)
    shape = [r.choice(SIZES[:7]) for _ in range(r.choice([1, 2, 2]))]
    tokens = torch.randint(v, shape)
    args |= {"tokens": laid_out(r, tokens), "seed": word(r), "offset": word(r), "t": r.choice([0, 0.01, 0.5, 1.0])}
    args["schedule"] = make_schedule(r.choice(["arctan", "cosine", "sd", "sqrt", "tess"]))
    if r.random() < 0.5:
        args["t"] = laid_out(r, torch.rand(shape[:-1], dtype=r.choice([torch.float32, torch.float64])))
    args["row_offset"] = r.choice([0, 7, 2**32 - tokens.numel()])
    if r.random() < 0.4:
        args["mask"] = laid_out(r, torch.rand(shape) < 0.5)
    if not call.faults and r.random() < 0.2:
        name, values = r.choice([
            ("tokens", [tokens.int(), torch.tensor(0)] + [tokens + v, tokens - v] * (tokens.numel() > 0)),
            ("t", [-0.1, 1.5, math.nan, torch.rand(7, 7), torch.ones(shape[:-1]).long()]),
            ("mask", [tokens, torch.ones(7, 7).bool()]), ("step", ["slow"]),
        ])  # fmt: skip
        call.fault(name, values)


FUNCTIONS = {
    "step": (draw_step, 60), "nearest": (draw_nearest, 14), "gaussian": (draw_gaussian, 12),
    "vocabulary": (draw_vocabulary, 7), "recall": (draw_recall, 3), "tokens": (draw_tokens, 7),
}  # fmt: skip
