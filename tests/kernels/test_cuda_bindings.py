"""From tensors to parameters: the CUDA library's real bindings over launchers that say what they were given."""

import json
import re
import shutil
import subprocess
import sys

import pytest

import setup

pytestmark = pytest.mark.compilers
SPEAKING = """
#include "launchers.h"
#include <cstdio>
namespace smoothie { namespace cuda {
static char text[600];
#define SAY(...) return std::snprintf(text, sizeof text, __VA_ARGS__), text
#define GIVEN(p) ((p) != nullptr)
const char* score(Mode mode, const StepParams& p, hopper::Stream s) {
  SAY("mode=%d type=%d N=%d D=%d table_stride=%d row_offset=%u F=%d weight=%g first=%d end=%d "
      "parts=%d chunks=%d resident=%d cluster=%d weights_stride=%d x=%d scale=%d std=%d numbers=%d keys=%d stream=%d",
      int(mode), int(p.type), int(p.n_rows), p.width, int(p.table_stride), p.row_offset, p.n_fields,
      p.fields ? p.fields[p.n_fields - 1].weight : 0, p.first_token, p.end_token, p.parts, p.chunks,
      p.resident, p.cluster, int(p.weights_stride), GIVEN(p.x), GIVEN(p.scale), GIVEN(p.std), GIVEN(p.numbers),
      GIVEN(p.keys), int(intptr_t(s)));
}
const char* stream(const StepParams& p, hopper::Stream) {
  SAY("first=%d end=%d parts=%d chunks=%d only=%d acc=%g", p.first_token, p.end_token, p.parts, p.chunks,
      p.only ? p.only[0] : -1, p.acc[0]);
}
const char* narrow(const StepParams& p, hopper::Stream) {
  SAY("end=%d parts=%d chunks=%d cluster=%d acc=%g", p.end_token, p.parts, p.chunks, p.cluster, p.acc[0]);
}
const char* prepare(const PrepareParams& p, hopper::Stream) {
  SAY("N=%d D=%d F=%d seed=%d offset=%d headroom=%g", int(p.n_rows), p.width, p.n_fields, int(*p.seed),
      int(p.offsets[p.n_fields - 1]), p.headroom);
}
const char* merge(const MergeParams& p, hopper::Stream) {
  SAY("N=%d D=%d table_stride=%d chunks=%d sums=%d lowest=%g highest_fit=%g smoothed=%d far=%d", int(p.n_rows),
      p.width, int(p.table_stride), p.chunks, p.sums, p.lowest, p.highest_fit, GIVEN(p.smoothed), GIVEN(p.far));
}
const char* nearest(const NearestParams& p, hopper::Stream) {
  p.nearest[0] = p.chunks, p.distance[0] = float(p.table_stride);
  return nullptr;
}
const char* gaussian(const GaussianParams& p, hopper::Stream) {
  SAY("N=%d columns=%d seed=%d offset=%d row_ids=%d", int(p.n_rows), int(p.columns), int(*p.seed), int(*p.offset),
      GIVEN(p.row_ids));
}
}}
"""

CALLS = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.smoothie_kernels_cuda

def said(op, *arguments):
    try:
        getattr(ops, op)(*arguments)
    except RuntimeError as error:
        return str(error).splitlines()[0]

n, v, d = 5, 40, 16
i, l = torch.int32, torch.int64
x, table = torch.randn(n, d).bfloat16(), torch.randn(v, 24).bfloat16()[:, :d]
row = torch.ones(n)
bias, seed, offsets = torch.zeros(v), torch.tensor(7), torch.tensor([3, 4])
numbers, tokens = torch.zeros(3, 4, n), torch.zeros(2, 4, n, dtype=i)
fields = torch.tensor([[1, 2, 0], [3, 4, 0x3F000000]], dtype=i)
nearest, distance = row.to(l), torch.zeros(n)

def score(x, table, weights=None, keys=None, bias=bias):
    found = numbers[:, :2].clone()
    return said("score", 5, x, table, bias, row, None, None, 9, fields, row, row, 8, 32, 4, 2, 3, 1, found, None,
                weights, keys, 6)

json.dump({
    "score": score(x, table, torch.empty(128, 128, dtype=torch.bfloat16)),
    "score half": score(x.half(), table.half()),
    "score keys": score(x, table, None, torch.zeros(n, 136, dtype=l)),
    "score kept": score(x, table, None, torch.zeros(n, 4, 2, 8, dtype=l)),
    "float32": score(x.float(), table.float()),
    "two types": score(x, table.half()),
    "other weights": score(x, table, torch.empty(128, 128)),
    "few weights": score(x, table, torch.empty(128, 127, dtype=torch.bfloat16)),
    "few rows of weights": score(x, table, torch.empty(n, 128, dtype=torch.bfloat16)),
    "few keys": score(x, table, None, torch.zeros(n, 127, dtype=l)),
    "other bias": score(x, table, bias=torch.zeros(v, dtype=torch.float64)),
    "short bias": score(x, table, bias=torch.zeros(v - 1)),
    "gaps in bias": score(x, table, bias=torch.zeros(2 * v)[::2]),
    "unaligned x": score(torch.zeros(n * d + 1).bfloat16()[1:].view(n, d), table),
    "unaligned table": score(x, torch.zeros(v, 24).bfloat16()[:, 4:4 + d]),
    "odd stride": score(x, torch.zeros(v, 20).bfloat16()[:, :d]),
    "odd width": score(x[:, :12].contiguous(), table[:, :12]),
    "other width": score(x[:, :8].contiguous(), table),
    "gaps in x": score(torch.zeros(n, 24).bfloat16()[:, :d], table),
    "stream": said("stream", x, table, bias, row, row, None, 0, fields, row, row, 3, torch.ones(n) > 0,
                   numbers[:, :3].clone(), tokens[:, :3].clone(), 2 * torch.ones(3, n, d), 0),
    "narrow": said("narrow", x, table, bias, row, row, None, 0, fields, row, row, 3, 2, numbers[:, :3].clone(),
                   tokens[:, :3].clone(), 3 * torch.ones(3, n, d), 0),
    "prepare": said("prepare", x, row, seed, offsets, None, 1.5, row, row, fields, 0),
    "merge": said("merge", x, table, row, row, row, -2.0, 3.0, numbers, tokens, torch.zeros(1, n, d), None,
                  x.clone(), row.to(l), row.to(l), row, row, row, row, None, 0),
    "merge, no sums": said("merge", x, table, row, row, row, -2.0, 3.0, numbers, tokens, None, None, None,
                           row.to(l), row.to(l), row, row, row, row, torch.ones(n) > 0, 0),
    "nearest": said("nearest", x, table, numbers[:1], tokens[:1], nearest, distance, 0),
    "nearest writes": [nearest[0].item(), distance[0].item()],
    "gaussian": said("gaussian", None, 0, torch.tensor(8), torch.tensor(2), torch.zeros(n, d), 0),
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the launchers say they were given, by call; the operators take CPU tensors when emulated."""
    if not shutil.which("c++"):
        pytest.skip("needs a compiler")
    folder = tmp_path_factory.mktemp("bindings")
    (folder / "launch.h").write_text(
        "#pragma once\nnamespace smoothie { namespace hopper { using Stream = void*; } }\n"
    )
    (folder / "speaking.cpp").write_text(SPEAKING)
    flags, link_flags = setup.torch_flags(setup.find_torch(setup.package_folders()))
    flags += ["-DSMOOTHIE_EMULATED", f"-I{folder}", f"-I{setup.ROOT}/csrc/cuda", "-O0"]
    sources = {"csrc/cuda/bindings.cpp": [], str(folder / "speaking.cpp"): []}
    library = folder / "speaking.so"
    setup.run_ninja(folder, setup.ninja_file(setup.find_compiler(), flags, sources, link_flags, library))
    done = subprocess.run([sys.executable, "-c", CALLS, library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            "score",
            "mode=5 type=0 N=5 D=16 table_stride=24 row_offset=9 F=2 weight=0.5 first=8 end=32",
        ),
        (
            "score",
            "parts=4 chunks=2 resident=3 cluster=1 weights_stride=128 x=1 scale=1 std=0 numbers=1 keys=0 stream=6",
        ),
        ("score half", "type=1"),
        ("score keys", "weights_stride=136 x=1 scale=1 std=0 numbers=1 keys=1"),
        ("score kept", "weights_stride=0 x=1 scale=1 std=0 numbers=1 keys=1"),
        ("stream", "first=0 end=40 parts=3 chunks=3 only=1 acc=2"),
        ("narrow", "end=40 parts=3 chunks=3 cluster=2 acc=3"),
        ("prepare", "N=5 D=16 F=2 seed=7 offset=4 headroom=1.5"),
        ("merge", "N=5 D=16 table_stride=24 chunks=4 sums=1 lowest=-2 highest_fit=3 smoothed=1 far=0"),
        ("merge, no sums", "chunks=4 sums=0 lowest=-2 highest_fit=3 smoothed=0 far=1"),
        ("gaussian", "N=5 columns=16 seed=8 offset=2 row_ids=0"),
    ],
)
def test_launchers_are_given(said, call, words):
    assert re.search(
        rf"smoothie_kernels_cuda::{call.partition(' ')[0].rstrip(',')}: (.* )?{re.escape(words)}", said[call]
    )


def test_a_launch_that_went_well_raises_nothing(said):
    assert said["nearest"] is None
    assert said["nearest writes"] == [4, 24]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("float32", "x must be bfloat16 or float16"),
        ("two types", "x and embeddings must be of one type"),
        ("other weights", "weights must be bfloat16 or float16"),
        ("few weights", "weights must have room for 128 columns"),
        ("few rows of weights", "weights must have sizes [128, 128]"),
        ("few keys", "keys must have room for 128 columns"),
        ("other bias", "bias has another type than its kernel reads"),
        ("short bias", "bias must have sizes [40]"),
        ("gaps in bias", "bias must be contiguous"),
        ("unaligned x", "x must begin at a multiple of 16 bytes"),
        ("unaligned table", "embeddings must begin at a multiple of 16 bytes"),
        ("odd stride", "embeddings must have rows a multiple of 8 numbers apart, not 20"),
        ("odd width", "x must have rows of a multiple of 8 numbers"),
        ("other width", "x and embeddings must have rows of one width"),
        ("gaps in x", "x must be contiguous"),
    ],
)
def test_tensors_that_do_not_fit(said, call, message):
    assert said[call].endswith(message)
