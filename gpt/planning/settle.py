"""``parallel.strategy=auto`` made into a layout, once for a run: what a folder was made with is kept.

Owns when a choice is made. The launcher asks on the login node; ranks that nobody launched ask before they make their
folder. What is written there is what was chosen, so that a run that is queued again chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from gpt.batch import cut
from gpt.compose import read_config
from gpt.composition import lay_out
from gpt.config import ParallelConfig, Strategy, TrainConfig
from gpt.errors import ConfigError
from gpt.planning.choice import Choice, choose
from gpt.planning.machine import Machine
from gpt.run_folder import RunFolder

SHOWN = 5


@dataclass(frozen=True)
class Settled:
    """How a run is spread, and why so."""

    parallel: ParallelConfig
    best: tuple[Choice, ...] = ()
    """The first of the layouts there were to choose from, where there was a choice."""
    why: str = ""
    """In words; empty where nobody had to choose."""


def settle(
    config: TrainConfig,
    overrides: Sequence[str],
    folder: RunFolder,
    world_size: int,
    machine: Callable[[], Machine],
) -> Settled:
    """Choose how to spread a run that leaves it open; what was typed of ``parallel`` beside that is kept.

    Args:
        config: of the run.
        overrides: what was typed.
        folder: of the run, where there may be one already.
        world_size: ranks.
        machine: what they run on; asked only where something is to be chosen.

    Raises:
        ConfigError: nothing is possible, or nothing fits.
    """
    if config.parallel.strategy is not Strategy.auto:
        return Settled(config.parallel)
    fixed = typed_keys(overrides)
    earlier = earlier_choice(config, fixed, folder, world_size)
    if earlier is not None:
        return Settled(earlier, why="as this run began; fresh=true chooses anew")
    seen = machine()
    found = choose(config, world_size, seen, fixed)
    why = f"1 of {len(found)} layouts that fit, by an estimate that ranks them on {seen}"
    return Settled(found[0].parallel, tuple(found[:SHOWN]), why)


def typed_keys(overrides: Sequence[str]) -> set[str]:
    """Keys of ``parallel`` that were typed, the strategy not."""
    keys = (word.split("=", 1)[0].lstrip("+") for word in overrides)
    return {key.removeprefix("parallel.") for key in keys if key.startswith("parallel.")} - {"strategy", "timeout_s"}


def earlier_choice(
    config: TrainConfig, fixed: Collection[str], folder: RunFolder, world_size: int
) -> ParallelConfig | None:
    """How the run of this folder is spread, where that goes on this number of ranks and nothing else was typed."""
    if not folder.config.is_file():
        return None
    earlier = replace(read_config(folder, TrainConfig).parallel, timeout_s=config.parallel.timeout_s)
    if earlier.strategy is Strategy.auto:  # written by a launcher of another kind, before anybody chose
        return None
    if any(getattr(earlier, key) != getattr(config.parallel, key) for key in fixed):
        return None
    try:
        cut(config.optim, lay_out(replace(config, parallel=earlier), world_size).data_ranks)
    except ConfigError:
        return None
    return earlier
