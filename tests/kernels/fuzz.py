"""Random calls of every public function: right to float64, or refused by an error that begins with an argument's name.

    PYTHONPATH=. python tests/kernels/fuzz.py [--seed S] [--calls 2000]     the long version, in child processes
    PYTHONPATH=. python tests/kernels/fuzz.py --seed S --only I             one call again, in this process

A call without a fault may not be refused, and one with a fault must be, by the name of an argument at fault. What this
hunts is gross: layouts, types, devices, contexts. Values next to a bound are for the other tests: bounds of gradients
here grow with the sizes of all terms.
"""

import argparse
import contextlib
import copy
import os
import pickle
import random
import re
import sys
import tempfile
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, func

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fuzz_calls import AROUND, Call, laid_out
from fuzz_truth import what_is_wrong

from smoothie_kernels import Vocabulary, expected_recall, fused_smoothie_step, nearest_token, noise
from smoothie_kernels.check import isolate
from smoothie_kernels.diffusion import noise_tokens

BATCH, SECONDS = 50, 600  # calls of one child process, and their time

# --- runs


def results(call, args):
    """The function's outputs, flat."""
    args = dict(args)
    if call.function == "recall":
        return [torch.tensor(expected_recall(**args), dtype=torch.float64, device="cpu")]
    if call.function == "gaussian":
        return [noise.gaussian(args.pop("rows"), args.pop("cols"), **args)]
    if call.function == "vocabulary":
        made = Vocabulary(args["embeddings"], backend=args["backend"]).to(args["device"])
        return [made.bias, *made.moments(), made.embeddings]
    if call.kept == "vocabulary":
        args["embeddings"] = Vocabulary(args["embeddings"], backend=args["backend"])
    if call.function == "tokens":
        return [noise_tokens(**args)]
    if call.function == "nearest":
        return [*nearest_token(**args)]
    step = fused_smoothie_step(**args)
    return [*step[:4], *(step.topk or [])]


def outputs_of(call, args):
    """In the way that the call is made."""
    if call.how == "func":
        which = 3 if call.function == "step" else 1
        of = call.transform(lambda t: results(call, args | {call.about: t})[which].sum())
        return [of(args[call.about].clone())]  # PyTorch refuses a tangent of memory that elements share
    if call.how == "compiled":
        torch._dynamo.reset()
        return torch.compile(partial(results, call), backend=call.about, fullgraph=not call.faults)(args)
    if call.how == "vmap":
        over = func.vmap(lambda batched: results(call, args | batched), in_dims=(call.batched,))
        return over({name: args[name] for name in call.batched})
    return results(call, args)


def gradients_of(call, outputs, leaves):
    """Gradients that come in, by the output's position, and those of leaves."""
    r, chosen = call.r, [i for i in (0, 3, 4, 6) if i < len(outputs)]
    chosen = r.sample(chosen, r.randint(1, len(chosen)))
    # Products of PyTorch's own are rounded by autocast, and it asks for backward outside of it.
    plain = call.args.get("smooth") == "topk+mean"
    with torch.autocast("cpu", enabled=False):
        incoming = {i: laid_out(r, torch.randn_like(outputs[i].detach())) for i in chosen}
        several = [torch.stack((-g, g)) for g in incoming.values()]
    with torch.autocast("cpu", enabled=False) if plain else contextlib.nullcontext():
        used, into = [outputs[i] for i in chosen], list(incoming.values())
        if call.how == "batched gradients":
            return incoming, [g[1] for g in torch.autograd.grad(used, leaves, several, is_grads_batched=True)]
        grads = torch.autograd.grad(used, leaves, into, create_graph=call.how == "twice")
        if call.how == "twice":
            torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
    return incoming, grads


def run(call):
    """Outputs; gradients that come in; gradients of leaves."""
    args = dict(call.args)
    for name in call.leaves:
        args[name] = args[name].detach().requires_grad_()
    leaves = [args[name] for name in call.leaves]
    if call.kept in ("copied", "pickled", "of inference"):
        with torch.inference_mode(call.kept == "of inference"):
            vocabulary = Vocabulary(args["embeddings"])
        copied = {"copied": copy.deepcopy, "pickled": lambda v: pickle.loads(pickle.dumps(v))}
        args["embeddings"] = copied.get(call.kept, lambda v: v)(vocabulary)
    with contextlib.ExitStack() as stack:
        for name in call.around:
            stack.enter_context(AROUND[name]())
        outputs = outputs_of(call, args)
        incoming, grads = gradients_of(call, outputs, leaves) if leaves else ({}, [])
    return [output.detach().clone() for output in outputs], incoming, grads


def memory(t):
    """All bytes of its storage: those around its elements too."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


def failure(seed, index, compiled=True):
    """What one call does wrong, in words; None for a call that is right, or rightly refused."""
    call = Call(seed, index, compiled)
    given = {
        name: value
        for name, value in call.args.items()
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and value.is_cpu
    }
    before = {name: memory(value) for name, value in given.items()}
    try:
        outputs, incoming, grads = run(call)
    except Exception as error:
        named = re.match(rf"(backend )?'?(smoothie_kernels takes one )?({'|'.join(call.faults)})\b", str(error))
        if not (call.faults and isinstance(error, call.refusals) and named):
            return f"{call}\n{''.join(traceback.format_exception(error)[-8:])}"
        wrong = []
    else:
        wrong = ["nothing is refused"] if call.faults else what_is_wrong(call, outputs, incoming, grads)
    wrong += [f"{name} was written to" for name in given if not torch.equal(memory(given[name]), before[name])]
    return f"{call}\n{'; '.join(wrong)}" if wrong else None


# --- the long version


def prepare():
    """torch.empty gives NaN: an output that is not written cannot look right."""
    warnings.simplefilter("ignore")  # PyTorch warns of the kinds of tensors that calls are given
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def run_some(seed, first, last, folder):
    """In a child process: writes which call it is at, so that a crash says which it was, and what is wrong."""
    prepare()
    for index in range(first, last):
        (folder / "at").write_text(str(index))
        wrong = failure(seed, index)
        if wrong:
            report(seed, index, wrong)
            (folder / f"wrong {index}").touch()


def report(seed, index, wrong):
    print(f"{wrong}\n  python tests/kernels/fuzz.py --seed {seed} --only {index}\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    if options.only is not None:
        prepare()
        wrong = failure(options.seed, options.only)
        if wrong:
            report(options.seed, options.only, wrong)
        sys.exit(bool(wrong))
    failures, first = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while first < options.calls:
            last = min(first + BATCH, options.calls)
            child = isolate.Call(run_some, (options.seed, first, last, folder), SECONDS, folder / "log")
            ((_, ended),) = isolate.run_calls([child], 1)
            print((folder / "log").read_text(), end="", flush=True)
            first = last
            if ended.code != 0:
                at = int((folder / "at").read_text())
                report(options.seed, at, f"the process: {ended}")
                failures, first = failures + 1, at + 1
        failures += len(list(folder.glob("wrong *")))
    print(f"{failures} of {options.calls} calls of seed {options.seed} are wrong")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
