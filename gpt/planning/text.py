"""The layouts there were to choose from, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpt.config import ParallelConfig
from gpt.planning.candidates import OFFLOADS, Candidate
from gpt.planning.hardware import Machine
from gpt.planning.memory import GIB, Memory
from gpt.topology.dims import Topology


def describe(parallel: ParallelConfig, layout: Topology) -> str:
    """The layout in words, with what its grid does not say."""
    words = [str(layout)]
    if layout.pp > 1:
        words.append(parallel.schedule.name)
    if layout.is_sharded and not parallel.reshard_after_forward:
        words.append("reshard_after_forward=false")
    return " ".join([*words, *(f"{key}=true" for key in OFFLOADS if getattr(parallel, key))])


def needs(one: Candidate, memory: Memory, machine: Machine) -> str:
    """A layout and what it takes of what there is."""
    host = ""
    if memory.host and machine.host is not None:
        room = "" if machine.host.room is None else f" of {machine.host.room / GIB:.3g}"
        host = f", and {memory.host / GIB:.3g}{room} GiB of the host"
    return (
        f"{describe(one.parallel, one.layout)} in passes of {one.batch.micro}, "
        f"{memory.total_gib:.3g} of {machine.room / GIB:.3g} GiB{host}"
    )


def table(choices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each of some layouts, as ``Choice.as_dict`` gives them, best first."""
    width = max((len(choice["layout"]) for choice in choices), default=0)
    passes = max((len(passes_of(choice)) for choice in choices), default=0)
    for number, choice in enumerate(choices, start=1):
        step_s = choice["step_s"]
        sent = {name: s for name, s in choice["communication_s"].items() if s >= 0.001 * step_s}
        shares = "".join(f", {name} {s / step_s:.1%}" for name, s in sent.items())
        host = f" and {choice['host_bytes'] / GIB:.3g} GiB of the host" if choice["host_bytes"] else ""
        yield (
            f"{number}. {choice['layout']:<{width}}  {passes_of(choice):>{passes}}, "
            f"{choice['memory_bytes'] / GIB:.3g} GiB{host}, {seconds(step_s)} a step, "
            f"{choice['tokens_per_s']:,.0f} tokens/s; idle {choice['idle_s'] / step_s:.1%}, "
            f"sending {sum(sent.values()) / step_s:.1%}{shares and f' ({shares[2:]})'}"
        )


def passes_of(choice: Mapping[str, Any]) -> str:
    """How a rank's sequences of a step are cut."""
    count = choice["accumulation"]
    return f"{count} pass{'es' if count > 1 else ''} of {choice['micro_batch']}"


def seconds(value: float) -> str:
    """A duration in a unit that suits it."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
