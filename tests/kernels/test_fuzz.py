"""The short version of fuzz.py: the same calls every time, none compiled. `make fuzz` is the long one."""

import warnings

import fuzz

SEED, CALLS = 1, 300


def test_random_calls(one_thread):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about the kinds of tensors that calls are given
        wrong = {index: fuzz.failure(SEED, index, compiled=False) for index in range(CALLS)}
    wrong = [f"--seed {SEED} --only {index}: {what}" for index, what in wrong.items() if what]
    assert not wrong, "\n".join(wrong)
