"""The end of an attempt whose replicas have drifted apart, with rank and host named.

How replicas are compared is gpt/parallel/replicas.py's; what follows for the host is the launcher's.
"""

from __future__ import annotations

import socket

from gpt.parallel.replicas import Drift, ReplicaCheck
from gpt.training.run import Run


class ReplicaDriftError(RuntimeError):
    """Replicas of parameters that are not the same to the bit; the run can go on from its last checkpoint."""


class ReplicaGuard:
    """The comparison of the replicas of a run, where the config asks for it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._check = ReplicaCheck(run.engine.module, run.world) if self.is_on else None
        if self._check is not None and not self._check.compares and run.world.is_first:
            print("divergence.replica_check_interval: each parameter is on one rank, nothing is compared", flush=True)

    @property
    def is_on(self) -> bool:
        """True where the config asks for comparisons."""
        return self._run.config.divergence.replica_check_interval > 0

    def check(self) -> None:
        """Compare the replicas after the step just done. Collective.

        Raises:
            ReplicaDriftError: some differ; raised on every rank, and entered in the event log.
        """
        drift = None if self._check is None or not self._check.compares else self._check.find_drift()
        if drift is not None:
            raise self._failure(drift)

    def _failure(self, drift: Drift) -> ReplicaDriftError:
        run = self._run
        host_of = run.world.gather(socket.gethostname())
        hosts = sorted({host_of[rank] for rank in drift.ranks})
        where = ", ".join(f"rank {rank} on {host_of[rank]}" for rank in drift.ranks)
        whom = "the other replicas of them" if drift.is_certain else "each other"
        cause = f"after step {run.step} the parameters of {where} differ from {whom}"
        told = {"ranks": drift.ranks, "hosts": hosts, "certain": drift.is_certain, "cause": cause}
        # All wait for it: an agent ends the others as soon as one rank has failed.
        run.world.on_first(
            lambda: run.folder.record_event("replicas_differ", attempt=run.attempt, step=run.step, **told)
        )
        return ReplicaDriftError(
            f"{cause}: a device or a memory has changed them; the run goes on from its last checkpoint, which was "
            "compared before it was saved"
        )
