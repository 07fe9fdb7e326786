"""What the benchmarks of whole models share: models, text, the count of products, and how one case is run.

Nothing here imports transformers before something is measured.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import timing
from benchmarks.common.race import Absent, Race, Suite, one_line
from benchmarks.common.report import Report, Row
from benchmarks.common.timing import Call, Timing
from benchmarks.models.cases import OURS, SEED, Contestant, ModelCase, SomeModelCase

PART_REPEATS = 2  # timed runs of a step's parts


def make_model(case: ModelCase, table: Tensor, device: str, **options: Any) -> Any:
    """The same case gives the same weights to everybody; options are more of the config."""
    from smoothie_kernels.diffusion.model import SmoothieConfig, SmoothieModel

    config = SmoothieConfig(
        *table.shape, hidden_size=case.hidden, num_hidden_layers=case.layers, num_attention_heads=case.heads,
        condition_layers=case.condition_layers, self_condition_layers=case.self_condition_layers,
        target_length=case.length, source_length=case.source, **options,
    )  # fmt: skip
    torch.manual_seed(SEED)
    return SmoothieModel(config, table).to(device)


def stretches(tokens: Tensor, *shape: int) -> Tensor:
    """The text in order, from its beginning, and again where it is too short."""
    size = int(torch.Size(shape).numel())
    return tokens.repeat(-(-size // len(tokens)))[:size].view(shape)


def counted(call: Callable[[], Any]) -> tuple[int, Any]:
    """Floating point operations of a call's matrix products, and what the call gives.

    Attention is taken apart into its products: of the library's own kernels some are not counted, and some of them
    recompute products.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        found = call()
    return counter.get_total_flops(), found


@dataclass(frozen=True)
class Products:
    """Matrix products of a case, and what they are held against."""

    flop: int  # of a step, or of a call
    vocabulary_flop: int  # of these, those with the table
    flop_per_s: float  # of N x V x D in float32, in the same run
    network_flop_per_s: float  # in the network's type
    checked: int  # samples of the batch that check and count have seen

    @property
    def seconds(self) -> float:
        """The products alone."""
        network = (self.flop - self.vocabulary_flop) / self.network_flop_per_s
        return network + self.vocabulary_flop / self.flop_per_s


class ModelRace(Race[SomeModelCase]):
    def __init__(self, suite: Suite, case: SomeModelCase) -> None:
        super().__init__(suite, case)
        self.checked = case.batch  # samples that check and count have seen
        self.flop, self.vocabulary_flop = 0, 0  # of the eager step's products, of these samples
        self.parts: dict[str, Call] = {}  # to be timed after `calls`
        self.products: Products | None = None
        self.dense_tensors = 6  # of rows x vocabulary, which the eager step holds at once, measured

    @abstractmethod
    def enter(self, contestant: Contestant) -> Call:
        """`admit` of those for whom there is room."""

    @abstractmethod
    def count(self) -> None:
        """Sets `flop` and `vocabulary_flop`, and makes what the others are compared with."""

    @abstractmethod
    def spent(self, name: str, parts: Mapping[str, Timing]) -> float:
        """The seconds of a contestant's timed call that go to the vocabulary."""

    def longer(self, name: str) -> float:
        """How many times the timed call the reported one takes."""
        return 1.0

    def new_row(self) -> Row:
        v, d = self.material.table.shape
        return Row(self.case.name, "", n=self.case.n, v=v, d=d)

    def admit(self, contestant: Contestant) -> Call:
        if contestant.dense and (reason := self.lacks(self.dense_tensors, self.case.n)):
            raise Absent(reason)
        return self.enter(contestant)

    def run(self, report: Report) -> None:
        super().run(report)
        name = self.case.name
        report.content.setdefault("cases", {})[name] = asdict(self.case)
        report.notes[name] = self.case.describe()
        if self.products:
            report.content.setdefault("products", {})[name] = asdict(self.products)
            report.notes[name] += f". {self.products.flop / 1e9:,.0f} Gflop of products"

    def check(self) -> None:
        while self.checked > 1 and self.lacks(self.dense_tensors, self.checked * self.case.length):
            self.checked //= 2  # the check needs the eager step, if not of the whole batch
        try:
            self.count()
        except Exception as error:
            for name in self.case.contestants:
                self.join(self.contestants[name])
            self.fail(self.contestants[OURS], f"has nothing to be compared with: {one_line(error)}", error)
            return
        super().check()
        if OURS not in self.calls:
            self.calls.clear()

    def time(self) -> None:
        """Calls in turn; then what they are made of and the machine's products, in turn."""
        if not self.calls:
            return
        case, clock = self.case, timing.clock_of(self.suite.device)
        repeats = self.suite.repeats or case.repeats
        self.suite.progress(f"{case.name}: timing")
        short = timing.race(self.calls, clock, patience=0, repeats=repeats)
        types = (torch.float32, case.network_type)
        gemms = {str(dtype): self._product(dtype) for dtype in set(types)}
        parts = timing.race({**self.parts, **gemms}, clock, patience=0, repeats=PART_REPEATS)
        rate, network_rate = (2 * case.n * self.material.table.numel() / parts[str(dtype)].median for dtype in types)
        flop, vocabulary_flop = (case.batch * flop / self.checked for flop in (self.flop, self.vocabulary_flop))
        self.products = Products(round(flop), round(vocabulary_flop), rate, network_rate, self.checked)
        times = {name: time.scaled(self.longer(name)) for name, time in short.items()}
        self.set_times(times, self.products.seconds)
        for name, time in times.items():
            spent, tokens_per_s = self.longer(name) * self.spent(name, parts), case.n / time.median
            share = spent / time.median
            self.set(name, tokens_per_s=tokens_per_s, vocabulary_seconds=spent, vocabulary_share=share)

    def _product(self, dtype: torch.dtype) -> Call:
        """One N x V x D product, into a tensor that exists."""
        table = self.material.table.to(self.suite.device, dtype)
        rows = table[torch.arange(self.case.n) % len(table)]
        out = torch.empty(len(rows), len(table), device=table.device, dtype=dtype)
        return lambda: torch.mm(rows, table.T, out=out)
