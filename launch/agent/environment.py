"""Environment of an attempt, written by the agents for workloads whose ranks do not tell it: ``environment.json``.

Each agent describes the ranks of its node in a file of its own, and the head node puts them together when all are
there. Torch-free. Must not know what the ranks compute.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

from launch.runs.files import read_json, write_json
from launch.runs.folder import RunFolder
from launch.runs.hosts import describe_rank, driver_version
from launch.runs.provenance import code_state, describe_code, library_versions
from launch.runs.rank_environment import describe_environment
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
        self._is_written = False

    def describe_node(self, ranks: Sequence[int], cpus: Sequence[Collection[int]] | None = None) -> None:
        """Write down what the ranks of this node run on, in the order of their local ranks.

        Args:
            ranks: of this node.
            cpus: to which each is bound; None where they run on all that this agent has.
        """
        entries = [describe_rank(rank, local, self._place) for local, rank in enumerate(ranks)]
        for local, bound in enumerate(cpus or ()):
            entries[local]["cores"] = len(bound)
        write_json(self._part(self._place), {"ranks": entries})

    def poll(self, workload: str, command: RankCommand, contract: RankContract, tree: CodeTree) -> None:
        """On the head node: write ``environment.json`` as soon as all nodes have described themselves."""
        if self._is_written or self._place:
            return
        parts = [read_json(self._part(place)).get("ranks") for place in range(self._nodes)]
        if any(part is None for part in parts):
            return
        ranks = [entry for part in parts for entry in part or ()]
        driver = driver_version()
        known = {
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
        write_json(self._folder.environment(self._attempt), known)
        self._is_written = True

    def _part(self, place: int) -> Path:
        return self._folder.attempt(self._attempt) / "nodes" / f"{place:05d}.json"
