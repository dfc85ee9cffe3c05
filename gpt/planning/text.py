"""The layouts there were to choose from, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpt.accounting.memory import GIB


def table(choices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each of some layouts, as ``Choice.as_dict`` gives them, best first."""
    width = max((len(choice["layout"]) for choice in choices), default=0)
    for number, choice in enumerate(choices, start=1):
        step_s = choice["step_s"]
        sent = {name: s for name, s in choice["communication_s"].items() if s >= 0.001 * step_s}
        shares = "".join(f", {name} {s / step_s:.1%}" for name, s in sent.items())
        yield (
            f"{number}. {choice['layout']:<{width}}  {choice['memory_bytes'] / GIB:.3g} GiB, {seconds(step_s)} a step, "
            f"{choice['tokens_per_s']:,.0f} tokens/s; idle {choice['idle_s'] / step_s:.1%}, "
            f"sending {sum(sent.values()) / step_s:.1%}{shares and f' ({shares[2:]})'}"
        )


def seconds(value: float) -> str:
    """A duration in a unit that suits it."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
