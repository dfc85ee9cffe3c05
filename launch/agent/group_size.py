"""Size of an agent group: with how many nodes a start is made, all that the run asks for or fewer where some are lost.

Owns the choice among the sizes that the plan allows, and the events that tell of it. Torch-free. Must not know who is
there, nor what the ranks compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.config import Config
from launch.runs.damage import read_plan
from launch.runs.events import ALL_NODES, FEWER_NODES, fewer_nodes
from launch.runs.folder import RunFolder


@dataclass(frozen=True)
class GroupSizes:
    """Numbers of nodes with which a run can be started."""

    full: int
    """As many as the run asks for."""
    fewer: tuple[int, ...] = ()
    """Smaller ones that its workload allows, from the largest."""

    @classmethod
    def of_run(cls, folder: RunFolder, config: Config) -> GroupSizes:
        """Return the sizes of a run, as its plan holds them.

        Raises:
            ConfigError: the plan is damaged.
        """
        promised = (read_plan(folder).get("promised") or {}) if config.may_shrink else {}
        return cls(config.nodes, tuple(promised.get("fewer_nodes") or ()))

    @property
    def least(self) -> int:
        """The smallest size."""
        return min(self.full, *self.fewer) if self.fewer else self.full

    def largest(self, available: int) -> int | None:
        """Return the largest size that ``available`` nodes can make; None where they are too few for any."""
        return next((size for size in (self.full, *self.fewer) if size <= available), None)


def record_size(
    folder: RunFolder, attempt: int, sizes: GroupSizes, hosts: Sequence[str], missing: Mapping[str, str]
) -> None:
    """Enter into the event log that an attempt runs on fewer nodes than the run asks for, or on all of them again.

    Args:
        hosts: those that take part.
        missing: the others of the job, each with the reason.
    """
    if len(hosts) < sizes.full:
        cause = "; ".join(f"{host}: {why}" for host, why in missing.items())
        told = {"nodes": len(hosts), "asked": sizes.full, "hosts": list(hosts), "cause": cause}
        folder.record_event(FEWER_NODES, attempt=attempt, **told)
        return
    before = max((number for number in folder.attempts() if number < attempt), default=0)
    if before in fewer_nodes(folder.read_events()):
        folder.record_event(ALL_NODES, attempt=attempt, nodes=sizes.full, hosts=list(hosts))
