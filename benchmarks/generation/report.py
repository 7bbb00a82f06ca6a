"""From passages to a table: tokens per second in prefill and decode, memory of a rank, and what is checked."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median

from benchmarks.generation.contenders import Contender, Passage
from benchmarks.peers.report import aligned, machine, versions

COLUMNS = ("", "prefill tokens/s", "decode tokens/s", "MB a rank", "first tokens as transformers")
PREFILL_GOAL, DECODE_GOAL = 1.5, 1.0  # of the fastest configuration of transformers


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of these lengths, and how many new tokens follow each. link: of the lab; None is loopback."""

    lengths: tuple[int, ...]
    new_tokens: int
    ranks: int
    link: str | None

    @property
    def title(self) -> str:
        few, many = min(self.lengths), max(self.lengths)
        tokens = f"{many}" if few == many else f"{few} to {many}"
        return (
            f"{self.link or 'loopback'}: {len(self.lengths)} prompts of {tokens} tokens, {self.new_tokens} new tokens "
            f"each, {self.ranks} ranks"
        )

    @property
    def prompt_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def decoded(self) -> int:
        return len(self.lengths) * (self.new_tokens - 1)


@dataclass(slots=True)
class Series:
    """One contender's repeats on one workload: tokens per second, of all ranks together."""

    contender: Contender
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    memory_mb: float = 0.0
    texts: dict[int, list[int]] = field(default_factory=dict)
    problem: str = ""

    @contextmanager
    def problems(self) -> Iterator[None]:
        """What the block raises is this contender's problem."""
        try:
            yield
        except Exception as failure:  # noqa: BLE001  the others go on
            self.problem = f"{type(failure).__name__}: {failure}".partition("\n")[0]

    def add(self, workload: Workload, passages: Sequence[Passage]) -> None:
        """A repeat, which takes as long as its slowest rank."""
        prefill_s = max(each.prefill_s for each in passages)
        whole_s = max(each.whole_s for each in passages)
        self.prefill.append(workload.prompt_tokens / prefill_s)
        self.decode.append(workload.decoded / (whole_s - prefill_s))
        for each in passages:
            self.texts |= each.texts


@dataclass(frozen=True, slots=True)
class Comparison:
    """All contenders on one workload."""

    workload: Workload
    repeats: int
    series: tuple[Series, ...]

    def fastest(self, what: str) -> Series | None:
        """The configuration of transformers that is fastest at "prefill" or "decode"."""
        theirs = [each for each in self.series if not each.contender.ours and getattr(each, what)]
        return max(theirs, key=lambda each: median(getattr(each, what)), default=None)

    def agreement(self, series: Series) -> float | None:
        """The share of prompts whose first new token is that of transformers' first configuration."""
        theirs = next((each for each in self.series if not each.contender.ours and each.texts), None)
        if theirs is None or not series.texts:
            return None
        same = [series.texts[number][0] == text[0] for number, text in theirs.texts.items()]
        return sum(same) / len(same)

    def ratio(self, series: Series, what: str) -> float | None:
        """Tokens per second over those of the fastest of transformers in the same round: median over the rounds."""
        other = self.fastest(what)
        if other is None or not getattr(series, what):
            return None
        pairs = zip(getattr(series, what), getattr(other, what), strict=True)
        return float(median(ours / theirs for ours, theirs in pairs))

    @property
    def failed(self) -> bool:
        """Whether one of ours did not run, or BF16 experts give other texts than transformers for most prompts."""
        for each in self.series:
            same = self.agreement(each)
            wrong = each.contender.options.get("experts") == "bf16" and same is not None and same < 0.5
            if each.contender.ours and (each.problem or wrong):
                return True
        return False

    def table(self) -> str:
        """Markdown whose columns line up, and a line for each of ours."""
        return "\n".join([*aligned([COLUMNS, *(self._cells(each) for each in self.series)]), "", *self.verdicts()])

    def _cells(self, series: Series) -> tuple[str, ...]:
        if series.problem:
            return (series.contender.name, "-", "-", "-", series.problem)
        same = self.agreement(series)
        return (
            series.contender.name,
            _spread(series.prefill),
            _spread(series.decode),
            f"{series.memory_mb:.0f}",
            "-" if same is None else f"{same:.0%}",
        )

    def verdicts(self) -> Iterable[str]:
        for each in self.series:
            if not each.contender.ours or each.problem:
                continue
            for what, goal in (("prefill", PREFILL_GOAL), ("decode", DECODE_GOAL)):
                ratio, other = self.ratio(each, what), self.fastest(what)
                if ratio is not None and other is not None:
                    yield f"{each.contender.name}: {what} {ratio:.2f} x {other.contender.name} (goal {goal:g})  "

    def as_dict(self) -> dict[str, object]:
        return {
            "workload": asdict(self.workload),
            "repeats": self.repeats,
            "rows": [
                {
                    "name": each.contender.name,
                    "prefill_tokens_per_s": each.prefill,
                    "decode_tokens_per_s": each.decode,
                    "prefill_ratio": self.ratio(each, "prefill"),
                    "decode_ratio": self.ratio(each, "decode"),
                    "memory_mb": each.memory_mb,
                    "agreement": self.agreement(each),
                    "problem": each.problem,
                }
                for each in self.series
            ],
        }


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})" if values else "-"


PROSE = """Each row is a model of its own in processes of its own, one thread for each rank, over gloo; all are there at
the same time and take turns in every round, so that a machine's moods meet all alike. Prefill is from a barrier to the
first new token of every prompt, decode from there to the last token, both of the slowest rank. Median, min and max are
over the rounds; a ratio is the median of the rounds' ratios to the fastest configuration of transformers. Memory is by
how much a rank's process has grown with the model and its generations. The prompts are random and of one length, which
is what suits transformers best: it pads others. First tokens differ where two are a rounding apart, and with FP4.

- transformers: `from_pretrained(..., distributed_config=DistributedConfig(...))` and `generate()`, greedy, sdpa
  attention. With tp the ranks share one batch, and dense weights are cut; with fsdp each has its own, and dense weights
  are gathered for each layer. After the comma how tokens reach experts, and how experts multiply.
- megamoe: `megamoe.model.load(path, group=group, experts=...)` and `megamoe.model.generation`, as `megamoe generate`
  runs them: prompts spread over the ranks, dense weights on each, and a text's bits do not depend on the others."""


def document(command: str, model: str, comparisons: Sequence[Comparison]) -> str:
    """The Markdown page of a run."""
    found = versions()
    packages = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers"))
    head = f"# Generation beside transformers\n\n`{command}`, {datetime.date.today()}, {machine()}; {packages}."
    tables = [f"## {each.workload.title}\n\n{each.repeats} rounds.\n\n{each.table()}".rstrip() for each in comparisons]
    return f"{head}\n\nThe model: {model}.\n\n{PROSE}\n\n" + "\n\n".join(tables) + "\n"
