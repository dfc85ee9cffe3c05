"""Identity of this node in its job: read from the variables of Slurm, of submitit's local executor, or neither.

Owns those variables, so that no other module reads them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

from launch.scheduler import client as scheduler


@dataclass(frozen=True)
class Node:
    """One agent among ``count``."""

    index: int
    count: int
    job: str
    """Names this start of the job: another one, a requeue included, has another name."""
    is_slurm: bool
    slurm_job: str = ""
    """Slurm's id of this job, ``A_a`` for an element of an array: the plain number can mean its siblings too."""
    restarts: int = 0
    """Number of times that Slurm has put this job back into the queue."""
    hosts: tuple[str, ...] = ()
    """Names of the job's nodes, in order, as Slurm knows them; empty elsewhere."""

    @property
    def slurm_names(self) -> tuple[str, ...]:
        """Ids by which Slurm knows this job: an element of an array has a number of its own besides."""
        return (self.slurm_job, self.job.split("-")[1]) if self.is_slurm else ()

    @property
    def slurm_step(self) -> str:
        """Slurm's id of the step that the agents are."""
        return f"{self.slurm_job}.{self.job.rpartition('-')[2]}"

    @property
    def is_head(self) -> bool:
        """Tell whether this node decides for all. Its loss is the loss of the job: the batch script runs there too."""
        return self.index == 0

    @property
    def host(self) -> str:
        """The name of this node."""
        return self.host_of(self.index)

    def host_of(self, index: int) -> str:
        """The name of node ``index`` of the job."""
        return self.hosts[index] if self.hosts else socket.gethostname()

    @classmethod
    def from_env(cls, token: str | None) -> Node:
        """Read where this process stands. ``token`` tells local jobs apart whose process ids are the same."""
        env = os.environ
        if env.get("SUBMITIT_EXECUTOR") == "local":
            index, count = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"])
            return cls(index, count, f"local-{env['SUBMITIT_LOCAL_JOB_ID']}-{token}", False)
        if "SLURM_PROCID" in env and "SLURM_JOB_ID" in env:
            job = f"slurm-{env['SLURM_JOB_ID']}-{env.get('SLURM_RESTART_COUNT', '0')}-{env.get('SLURM_STEP_ID', '0')}"
            array = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in env else ""
            restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
            index, count = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
            names = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
            hosts = tuple(scheduler.run("scontrol", "show", "hostnames", names).split())
            return cls(index, count, job, True, array or env["SLURM_JOB_ID"], restarts, hosts)
        return cls(0, 1, f"process-{os.getpid()}-{socket.gethostname()}", False)

    def taken_hosts(self) -> set[str]:
        """Names of the nodes that Slurm has taken from this job since its start; none where it does not answer."""
        if not self.is_slurm:
            return set()
        try:
            left = scheduler.nodes_left(self.slurm_job, retries=1)
        except scheduler.SlurmError:
            return set()
        return {*self.hosts} - left if self.host in left else set()  # else it is being requeued, and not told anew

    def own_address(self) -> str:
        """The address at which the other nodes of the job reach this one."""
        if not self.is_slurm or self.count == 1:
            return LOOPBACK
        peer = next((host for host in self.hosts if host != self.host), None)
        return LOOPBACK if peer is None else address_towards(peer)


LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915  # linux/sockios.h: get the address of an interface


def address_towards(peer: str) -> str:
    """The address of this machine on the route to ``peer`` (a name or an address). Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The interface that has ``address``, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
