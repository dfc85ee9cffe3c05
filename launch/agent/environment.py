"""Environment of an attempt, written by the agents for workloads whose ranks do not tell it: ``environment.json``.

Each agent describes the ranks of its node in a file of its own, and the head node puts them together when all are
there. What a full filesystem does not take is tried again: no run ends for its record. Torch-free. Must not know what
the ranks compute.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from launch.runs.files import read_json
from launch.runs.folder import RunFolder
from launch.runs.hosts import describe_cpus, describe_rank, driver_version
from launch.runs.provenance import code_state, describe_code, library_versions
from launch.runs.rank_environment import describe_environment
from launch.runs.unwritten import has_written
from launch.workload import CodeTree, RankCommand, RankContract


class EnvironmentRecord:
    """The part of one agent in the record of an attempt.

    Args:
        folder: of the run.
        attempt: number of the start.
        place: of this node among those that take part; the first puts the record together.
        nodes: how many take part.
    """

    def __init__(self, folder: RunFolder, attempt: int, place: int, nodes: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._place = place
        self._nodes = nodes
        self._part_left: dict[str, Any] | None = None
        self._known: dict[str, Any] = {}
        self._is_written = False

    def describe_node(self, ranks: Sequence[int], cpus: Sequence[Collection[int]] | None = None) -> None:
        """Write down what the ranks of this node run on, in the order of their local ranks.

        Args:
            ranks: of this node.
            cpus: to which each is bound; None where they run on all that this agent has.
        """
        entries = [describe_rank(rank, local, self._place) for local, rank in enumerate(ranks)]
        for local, bound in enumerate(cpus or ()):
            entries[local] |= describe_cpus(bound)
        self._part_left = {"ranks": entries}
        self._write_part()

    def _write_part(self) -> None:
        if self._part_left is not None and has_written(self._part(self._place), self._part_left):
            self._part_left = None

    def poll(self, workload: str, command: RankCommand, contract: RankContract, tree: CodeTree) -> None:
        """On the head node: write ``environment.json`` as soon as all nodes have described themselves."""
        self._write_part()
        if self._is_written or self._place:
            return
        self._known = self._known or self._describe(workload, command, contract, tree)
        self._is_written = bool(self._known) and has_written(self._folder.environment(self._attempt), self._known)

    def _describe(self, workload: str, command: RankCommand, contract: RankContract, tree: CodeTree) -> dict[str, Any]:
        """Put the record of the attempt together; empty while a node has not described itself."""
        parts = [read_json(self._part(place)).get("ranks") for place in range(self._nodes)]
        if any(part is None for part in parts):
            return {}
        ranks = [entry for part in parts for entry in part or ()]
        driver = driver_version()
        return {
            "attempt": self._attempt,
            "time": time.time(),
            "workload": workload,
            "command": list(command.args),
            "world_size": len(ranks),
            "ranks": ranks,
            "environment": describe_environment(),
            "software": library_versions() | ({"nvidia-driver": driver} if driver else {}),
            "git": code_state(tree.root),
            "code": describe_code(tree.root, tree.files),
            "unit": contract.unit,
            "work_per_step": contract.work_per_step,
            "weak_scaling": contract.weak_scaling,
            "max_steps": contract.max_steps,
        }

    def _part(self, place: int) -> Path:
        return self._folder.attempt(self._attempt) / "nodes" / f"{place:05d}.json"
