"""Requirements of the machine, checked before anything is started: Debian's packages, and the rights for namespaces.

Owns the list of programs and the packages they come in. Starts nothing that outlives the question.
"""

from __future__ import annotations

import shutil

from launch.errors import ConfigError
from slurm.sandbox.commands import SandboxError, run, search_path

# program -> Debian package
EVERYWHERE = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "srun": "slurm-client",
    "sinfo": "slurm-client",
    "squeue": "slurm-client",
    "scontrol": "slurm-client",
    "scancel": "slurm-client",
    "munged": "munge",
    "setsid": "util-linux",
}
WITH_NAMESPACES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
    "ip": "iproute2",
    "tc": "iproute2",
}
WITH_LOSS = {"nft": "nftables"}
WITH_ACCOUNTING = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
    "sacctmgr": "slurm-client",
}


def missing(programs: dict[str, str]) -> list[str]:
    """The Debian packages, in order and once each, of those programs that are not on this machine."""
    path = search_path()
    return sorted({package for program, package in programs.items() if shutil.which(program, path=path) is None})


def require(programs: dict[str, str]) -> None:
    """Refuse with the one command that installs what is missing; ConfigError."""
    packages = missing(programs)
    if packages:
        raise ConfigError(
            found=f"this machine lacks Debian's {', '.join(packages)}",
            expected="Slurm, MUNGE and the programs that build the nodes",
            fix=f"apt-get install --no-install-recommends {' '.join(packages)}",
        )


def why_no_namespaces(probe_interface: str) -> str | None:
    """Reason for which nodes cannot be hosts of their own here, in the kernel's words; None where they can.

    Tries both rights that are needed: new namespaces with mounts in them, and a bridge (``probe_interface``, removed
    again) in the network namespace that this process is in.
    """
    mounts = "mount -t tmpfs tmpfs /dev/shm && mount -t sysfs sysfs /sys && ip link set lo up"
    try:
        run(["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c", mounts])
        run(["ip", "link", "add", probe_interface, "type", "bridge"])
        run(["ip", "link", "del", probe_interface])
    except SandboxError as error:
        return str(error)
    return None
