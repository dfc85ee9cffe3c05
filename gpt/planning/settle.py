"""``parallel.strategy=auto`` made into a layout, once for a run: what a folder was made with is kept.

Owns when a choice is made. The launcher asks on the login node; ranks that nobody launched ask before they make their
folder. What is written there is what was chosen, so that a run that is queued again chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from gpt.config import ParallelConfig, Strategy, TrainConfig
from gpt.planning.choice import Choice, choose
from gpt.planning.fitting import MICRO_BATCH, with_passes
from gpt.planning.hardware import Machine
from gpt.topology.batch import cut
from gpt.topology.composition import lay_out
from launch.errors import ConfigError
from launch.runs.compose import read_config
from launch.runs.folder import RunFolder, typed_key
from launch.runs.overrides import read_overrides, typed_value

Config = TypeVar("Config", bound=TrainConfig)
SHOWN = 5


@dataclass(frozen=True)
class Settled:
    """How a run is spread, and why so."""

    parallel: ParallelConfig
    micro_batch: int
    """``optim.micro_batch``: as it was typed, or smaller."""
    best: tuple[Choice, ...] = ()
    """The first of the layouts there were to choose from, where there was a choice."""
    why: str = ""
    """In words; empty where nobody had to choose."""
    left_out: tuple[str, ...] = ()
    """Why not another, and what it took to fit, in words: a line each."""

    def apply(self, config: Config) -> Config:
        """The config with nothing left open."""
        return replace(with_passes(config, self.micro_batch), parallel=self.parallel)


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
        return Settled(config.parallel, config.optim.micro_batch)
    fixed = typed_keys(overrides)
    earlier = earlier_choice(config, overrides, fixed, folder, world_size)
    if earlier is not None:
        return earlier
    seen = machine()
    found = choose(config, world_size, seen, fixed)
    first, number = found.choices[0], len(found.choices)
    why = f"1 of {number} layouts that fit, by an estimate that ranks them on {seen}"
    if first.micro_batch != config.optim.micro_batch:
        why = f"optim.micro_batch={first.micro_batch} instead of {config.optim.micro_batch}, and {why}"
    return Settled(first.parallel, first.micro_batch, found.choices[:SHOWN], why, found.left_out)


def typed_keys(overrides: Sequence[str]) -> set[str]:
    """Keys of ``parallel`` that were typed, the strategy not; and ``optim.micro_batch``."""
    keys = {typed_key(word) for word in overrides}
    ours = {key.removeprefix("parallel.") for key in keys if key.startswith("parallel.")}
    return ours - {"strategy", "timeout_s"} | keys & {MICRO_BATCH}


def earlier_choice(
    config: TrainConfig, overrides: Sequence[str], fixed: Collection[str], folder: RunFolder, world_size: int
) -> Settled | None:
    """How the run of this folder is spread, where that goes on this number of ranks and nothing else was typed."""
    if not folder.config.is_file():
        return None
    before = read_config(folder, TrainConfig)
    earlier = replace(before.parallel, timeout_s=config.parallel.timeout_s)
    if earlier.strategy is Strategy.auto:  # written by a launcher of another kind, before anybody chose
        return None
    if any(getattr(earlier, key) != getattr(config.parallel, key) for key in {*fixed} - {MICRO_BATCH}):
        return None
    if typed_value(overrides, MICRO_BATCH) != typed_value(read_overrides(folder), MICRO_BATCH):
        return None
    settled = Settled(earlier, before.optim.micro_batch, why="as this run began; fresh=true chooses anew")
    chosen = settled.apply(config)
    try:
        cut(chosen.optim, lay_out(chosen, world_size).data_ranks)
    except ConfigError:
        return None
    return settled
