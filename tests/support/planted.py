"""What a program with planted faults says about each fault: which verdicts of ``launch.why`` are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from launch import worker


@dataclass(frozen=True)
class Fault:
    """A fault and its right verdict, as a user expects it from docs/troubleshooting.md."""

    kinds: tuple[str, ...]
    """Kinds of verdict that are right; none for a quiet program, which has no fault and gets no verdict."""
    line: str = ""
    """Parts of the lines of the program where the fault is, divided by ``|``; empty if no line of it has the fault."""
    has_rank: bool = True
    """False if all ranks take part in the fault alike, so that a verdict may name any of them."""
    make: Callable[..., Any] | None = None
    when: str = "step"
    """Where the program calls ``make``; the program has the list."""
    needs: str = ""
    """What the fault is made with, and what the benchmark prepares: a key of ``benchmarks.faults.causes.PLACES``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the program itself for this fault."""
    words: tuple[str, ...] = ()
    """Words for the command line of the launcher."""


@dataclass
class Scene:
    """What a fault can change in the rank that it comes on: the state of the program at the step of the fault."""

    run: worker.Run
    is_faulty: bool
    """True on the rank of the fault."""
    step: int
    """Step of the fault, from 1."""
    folder: Path
    """Folder for files of the fault."""
    model: torch.nn.Module
    loss: torch.Tensor | None = None
    """Loss of the present step; None before the first."""


def register(faults: dict[str, Fault], *kinds: str, **given: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds a function to ``faults``, as the fault of the function's name."""

    def add(make: Callable[..., Any]) -> Callable[..., Any]:
        faults[make.__name__] = Fault(kinds, make=make, **given)
        return make

    return add
