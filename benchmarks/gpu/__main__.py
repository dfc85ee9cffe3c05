"""Throughput, memory and host waits of training steps on the GPUs of this machine, and the gain of each default.

    python -m benchmarks.gpu --nanogpt PATH            # all groups within eight minutes, the most important first
    python -m benchmarks.gpu --only models,peers       # some groups
    python -m benchmarks.gpu --device cpu --to FOLDER  # the same groups without a GPU: tiny sizes, no waits

A group is a list of training steps to compare, its entries. A contestant is the process that makes the steps of one
entry. The entries of the group `models` train on all GPUs at their defaults, in bf16 and compiled. Every other group
compares its first entry with the others. The group `engines` uses all GPUs, the other groups use one. Contestants whose
planned memory fits into the GPU together warm up together. Then they take turns of about ``TURN_S`` seconds, one turn
in each of ``--rounds`` rounds, in another order in each round. A contestant of this project makes whole steps of
``gpt.train``. The ratio is the contestant's time for a token over that of the first contestant in the same round; the
page has the median over the rounds. Above 1, the first contestant is faster.

MFU follows the PaLM convention, against the peak in the precision of the row. The next column compares with the rate
that a product of two square matrices reached on this GPU before the first contestant started. Waits are the places at
which the host waits for the device in ten steps, found by ``torch.cuda.set_sync_debug_mode``. If this finds none, the
contestant makes ten more steps in mode ``error`` to check it. The script writes the page and its JSON after each row.
The exit status is 0, 1 if a contestant failed, or 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.groups import DATA, Entry, Group, Machine, groups, packs, planned
from benchmarks.page import chosen, line_of, stamp
from benchmarks.turns import ROOT, Contestant, opened, ratio, take_turns
from launch.errors import ConfigError

NAMES = ("models", "peers", "engines", "changes", "experts", "float8")
TURN_S = 1.0
MOST_STEPS = 20
"""Largest number of training steps that the process of an entry makes in one turn."""
AT_ONCE = 7
"""Largest number of entries whose processes share the GPUs. Each process compiles, and its CUDA context takes half a
GiB."""
SQUARE = {"cuda": 8192, "cpu": 512}
"""Device -> number of rows and columns of the square matrices whose product gives the measured rate."""
ASKED_S = 10.0
"""Time limit in seconds for the answer of an entry's process to a request without a training step, such as its peak
memory."""
CPU_GIB = 8.0
"""Memory in GiB that ``--device cpu`` assumes for each device."""
TITLES = (
    *("contestant", "ranks", "micro-batch", "step, ms", "best, ms", "tokens/s", "MFU", "of the measured rate"),
    *("memory, GiB", "planned, GiB", "ratio", "waits", "outcome"),
)


@dataclass
class Row:
    """Row of the result table: the measurements of one entry. A figure is None if it is not measured."""

    group: str
    entry: Entry
    outcome: str = "ok"
    told: dict[str, Any] = field(default_factory=dict)
    """Properties that the process of the entry reports about itself: model, device, FLOPs per token, planned memory."""
    step_s: float | None = None
    """Median step time over the rounds, in seconds; None if it was not measured."""
    best_s: float | None = None
    peak_gib: float | None = None
    ratio: float | None = None
    waits: dict[str, int] | None = None

    def cells(self, rates: dict[str, float]) -> list[str]:
        """Return the cells of this row. ``rates`` is precision -> measured FLOP/s."""
        told = self.told
        cells = [self.entry.name, str(self.entry.ranks), str(self.entry.micro_batch)]
        if self.step_s is None or self.best_s is None:
            return [*cells, *[""] * (len(TITLES) - len(cells) - 1), self.outcome]
        tokens_per_s = told["tokens"] / self.step_s
        rate = told["flops_per_token"] * tokens_per_s / told["ranks"]
        shares = [told.get("peak_flops_per_s"), rates.get(told["precision"])]
        cells += [f"{1e3 * self.step_s:.1f}", f"{1e3 * self.best_s:.1f}", f"{tokens_per_s:,.0f}"]
        cells += [f"{rate / share:.1%}" if share else "" for share in shares]
        cells += ["" if self.peak_gib is None else f"{self.peak_gib:.2f}"]
        cells += ["" if self.entry.peer else f"{told['planned_gib']:.2f}"]
        cells += ["" if self.ratio is None else f"{self.ratio:.3f}"]
        cells += ["" if self.waits is None else ", ".join(f"{n} at {at}" for at, n in self.waits.items()) or "none"]
        wanted = f"; wanted of one H100: {self.entry.target}" if self.entry.target else ""
        return [*cells, self.outcome + wanted]


@dataclass
class Measurement:
    """The results of this program so far. The class writes the result page."""

    machine: Machine
    typed: str
    deadline: float
    """Time of ``time.monotonic`` after which no new measurement starts."""
    to: Path
    rounds: int
    nanogpt: Path | None = None
    rates: dict[str, float] = field(default_factory=dict)
    """Precision -> measured rate of a product of two large matrices, in FLOP/s."""
    rows: list[Row] = field(default_factory=list)

    def left_s(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, row: Row) -> None:
        """Append a row, print it, and write the page and its JSON."""
        self.rows.append(row)
        print(f"{row.group}: {line_of(row.cells(self.rates))}", flush=True)
        self.to.mkdir(parents=True, exist_ok=True)
        (self.to / "gpu.md").write_text(self.page())
        kept = {"rates": self.rates, "rows": [asdict(one) for one in self.rows]}
        (self.to / "gpu.json").write_text(json.dumps(kept, indent=1, default=str))

    def page(self) -> str:
        """Return the rows so far as a Markdown page."""
        first = next((row.told for row in self.rows if row.told), {})
        device = f"{self.machine.ranks} x {first.get('device', self.machine.device)}"
        versions = {name: first.get("software", {}).get(name) for name in ("cuda", "nccl", "driver")}
        device += "".join(f", {name} {version}" for name, version in versions.items() if version)
        told = [f"{rate / 1e12:.1f} TFLOP/s in {precision}" for precision, rate in self.rates.items()]
        about = (__doc__ or "").split("\n\n")[2:]
        title = "On GPUs" if self.machine.device == "cuda" else "Rehearsed without a GPU"
        parts = [f"# {title}: {device.partition(',')[0]}", f"`{self.typed}`", *(one.strip() for one in about)]
        parts += [stamp(device)]
        if told:
            side = SQUARE[self.machine.device]
            parts += [f"A product of two matrices of {side} x {side}: {', '.join(told)}."]
        for name in dict.fromkeys(row.group for row in self.rows):
            lines = [line_of(TITLES), line_of(["---"] * len(TITLES))]
            lines += [line_of(row.cells(self.rates)) for row in self.rows if row.group == name]
            parts += [f"## {name.capitalize()}", "\n".join(lines)]
        return "\n\n".join(parts) + "\n"


def measure_rates(found: Measurement, folder: Path) -> None:
    """Measure the rate of a product of two large matrices in each precision that the device supports, and add the rates
    to ``found.rates``. ``folder`` is for the result file of ``gpt.bench_matmul``."""
    side, output = SQUARE[found.machine.device], folder / "matmul.json"
    words = [f"--device={found.machine.device}", f"--sizes={side}", f"--output={output}", "--budget-s=0.3"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        command = [sys.executable, "-m", "gpt.bench_matmul", *words]
        subprocess.run(command, cwd=ROOT, timeout=max(1.0, found.left_s()), stdout=subprocess.DEVNULL, check=False)
    if output.is_file():
        for sample in json.loads(output.read_text())["samples"]:
            found.rates[sample["precision"]] = 2 * side**3 / sample["seconds"]


def command(entry: Entry, group: Group, found: Measurement, folder: Path) -> list[str]:
    """Return the command line that starts the contestant of an entry, the process that makes its training steps.

    Args:
        entry: the entry.
        group: group of the entry, with the shape of its model.
        found: results so far, with the machine and the checkout of nanoGPT.
        folder: folder for prepared data and runs.
    """
    kept = [f"data.cache_dir={folder / 'data'}", f"output_dir={folder}"]
    shape = None if group.shape is None else asdict(replace(group.shape, batch=entry.micro_batch))
    told = {
        "words": [*entry.words, *kept],
        "without": entry.without,
        "peer": entry.peer,
        "shape": shape,
        "checkout": None if found.nanogpt is None else str(found.nanogpt.absolute()),
        "compiled": found.machine.device == "cuda",
        "device": found.machine.device,
        "data": [*DATA[found.machine.device], *kept[:1]],
    }
    starter = [sys.executable, "-m"]
    if entry.ranks > 1:  # the address is given: that of the host's name may be none
        starter += ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        starter += [f"--nproc-per-node={entry.ranks}", "-m"]
    return [*starter, "benchmarks.gpu.contestant", json.dumps(told)]


def measure_pack(group: Group, pack: Sequence[Entry], found: Measurement, folder: Path) -> None:
    """Measure the entries of a pack at the same time: start a process for each entry, let the processes make training
    steps in turns, and add a row of results for each entry. An entry that has a row already, from an earlier pack, gets
    no second row: the first entry of the group is measured in several packs, because others are compared with it.

    Args:
        group: group of the entries.
        pack: entries of the group whose planned memory fits into one device together.
        found: results so far, to which the rows are added.
        folder: folder for prepared data and runs.
    """
    known = {row.entry.name for row in found.rows if row.group == group.name}
    with contextlib.ExitStack() as stack:
        everybody = {
            entry.name: stack.enter_context(
                opened(
                    entry.name,
                    command(entry, group, found, folder),
                    dict(entry.environment),
                    log=found.to / "logs" / f"{group.name}_{'_'.join(entry.name.replace('/', ' ').split())}.log",
                )
            )
            for entry in pack
        }
        for one in everybody.values():
            one.told = one.answer(found.left_s())
            print(f"  {one.name}: {one.failure or 'warm'}, {found.left_s():.0f} s left", file=sys.stderr, flush=True)
        take_turns([*everybody.values()], found.rounds, steps_of_turn, found.left_s)
        base = everybody.get(group.entries[0].name)  # not there where only one of the two fits
        for entry in pack:
            if entry.name not in known:
                found.add(row_of(group, entry, everybody[entry.name], base, found))


def steps_of_turn(one: Contestant) -> int:
    """Return the number of training steps that the process ``one`` makes in about ``TURN_S`` seconds, at least 1 and at
    most ``MOST_STEPS``."""
    return max(1, min(MOST_STEPS, round(TURN_S / one.told["step_s"])))


def row_of(group: Group, entry: Entry, one: Contestant, base: Contestant | None, found: Measurement) -> Row:
    """Ask the contestant of an entry, which is its process, for peak memory and waits. Return the row of the entry.

    Args:
        group: group of the entry.
        entry: the entry.
        one: contestant of the entry, after its last turn.
        base: contestant of the group's first entry, which the entry is compared with; None gives the row no ratio.
        found: results so far, with the deadline.
    """
    first = {} if base is None else base.told
    if entry.peer and one.told and first:
        if one.told["parameters"] != first["parameters"]:
            one.failure = f"another model: {one.told['parameters']:,} parameters, not {first['parameters']:,}"
        one.told = {**first, **one.told}  # the same work
    row = Row(group.name, entry, outcome_of(one, found), one.told)
    if one.failure or not one.wall or "tokens" not in one.told:
        return row
    row.step_s, row.best_s = statistics.median(one.wall), min(one.wall)
    if group.compares and base is not None and one is not base and base.wall:
        row.ratio = ratio(one.wall, base.wall) * first["tokens"] / one.told["tokens"]
    row.peak_gib = one.ask("memory", ASKED_S).get("peak_gib")
    if entry.without != "running ahead" and found.left_s() > 0:
        row.waits = one.ask("waits", found.left_s()).get("waits")
    row.outcome = outcome_of(one, found)
    return row


def outcome_of(one: Contestant, found: Measurement) -> str:
    """Return the outcome of the process ``one`` as text: ``ok``, the failure, or that no time was left."""
    if found.left_s() <= 0 and (one.failure or not one.wall):
        return "no time was left"
    return f"failed: {one.failure}" if one.failure else "ok"


def measure(group: Group, found: Measurement, folder: Path, at_once: int) -> None:
    """Measure the entries of a group until the deadline. Each entry that is not measured gets a row with the reason.

    Args:
        group: the group.
        found: results so far, to which the rows are added.
        folder: folder for the runs.
        at_once: largest number of entries that are measured at the same time.
    """
    entries = []
    for entry in group.entries:
        try:
            entries.append(planned(found.machine, entry))
        except ConfigError as error:
            found.add(Row(group.name, entry, f"refused: {error.found}; expected {error.expected}"))
    if not entries:
        return
    for pack in packs(replace(group, entries=tuple(entries)), found.machine, at_once):
        if found.left_s() > 0:
            measure_pack(group, pack, found, folder)
            continue
        known = {row.entry.name for row in found.rows if row.group == group.name}
        for entry in pack:
            if entry.name not in known:
                found.add(Row(group.name, entry, "no time was left"))


def this_machine(device: str, ranks: int) -> Machine:
    """Return the properties of the GPUs of this machine, or those that ``--device cpu`` assumes. ``ranks`` 0 takes all
    GPUs, or two CPU ranks.
    """
    if device == "cpu":
        return Machine(device, ranks or 2, CPU_GIB)
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Machine(device, ranks or torch.cuda.device_count(), memory_gib)


def parse() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses with tiny sizes")
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a checkout of it; else left out")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--ranks", type=int, default=0, help="default: all GPUs, or two on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=460.0, help="after which nothing begins (%(default)s)")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="contestants in memory together (%(default)s)")
    parser.add_argument(
        "--to", type=Path, default=ROOT / "benchmarks" / "gpu", metavar="FOLDER", help="for gpu.md and gpu.json"
    )
    return parser.parse_args()


def main() -> int:
    """Run all measurements. Returns the exit status, which the docstring of the module explains."""
    words = parse()
    only = chosen(words.only, NAMES)
    if words.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here, so nothing is run; --device cpu rehearses the lists", file=sys.stderr)
        return 2
    machine = this_machine(words.device, words.ranks)
    typed = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    deadline = time.monotonic() + words.budget_s
    to: Path = words.to.absolute()
    found = Measurement(machine, typed, deadline, to, words.rounds, words.nanogpt)
    (to / "logs").mkdir(parents=True, exist_ok=True)
    # As many compilers as processes would be: each starts one for each core else.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // 4)))
    with tempfile.TemporaryDirectory(prefix="gpu_") as place:
        measure_rates(found, Path(place))
        for group in groups(machine, words.nanogpt is not None):
            if group.name in only:
                measure(group, found, Path(place), words.at_once)
    print(f"written: {to / 'gpu.md'} and gpu.json")
    return int(any(row.outcome.startswith("failed") for row in found.rows))


if __name__ == "__main__":
    sys.exit(main())
