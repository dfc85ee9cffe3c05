"""The text of slurm.conf, slurmdbd.conf, gres.conf, the epilog and the nodes' hosts file. Pure: it writes nothing.

The lines follow what Slurm 22.05 and later accept; each that is not a matter of taste says why it is there.
"""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

from slurm.sandbox.state import State


def controller_name(state: State) -> str:
    """The controller's host name: of its own with namespaces, else this machine's without the domain."""
    return "ctl" if state.mode == "namespaces" else socket.gethostname().partition(".")[0]


def slurm_conf(state: State) -> str:
    """The whole of slurm.conf, the user's own lines in place of ours."""
    lines = _general(state)
    names = {key.lower(): key for key in lines}
    for line in state.settings.slurm_conf:
        key, _, value = line.partition("=")
        lines[names.get(key.lower(), key)] = value
    text = [f"{key}={value}" for key, value in lines.items()]
    return "\n".join([*text, *_nodes(state), *_partitions(state)]) + "\n"


def _general(state: State) -> dict[str, str]:
    user = pwd.getpwuid(os.getuid()).pw_name
    return {
        "ClusterName": state.settings.cluster_name,
        "SlurmctldHost": f"{controller_name(state)}({state.controller.address})",
        "SlurmctldPort": str(state.controller.port),
        **_listening(state),
        "SlurmUser": user,
        "SlurmdUser": user,
        **_directories(state.directory),
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job may start only when its old credential has expired, 120 s by default.
        "AuthInfo": f"socket={state.munge_socket},cred_expire=5",
        "ProctrackType": "proctrack/linuxproc",
        "Epilog": str(epilog_file(state)),
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        # More CPUs and memory than the machine has.
        "SlurmdParameters": "config_overrides",
        "GresTypes": "gpu",
        "MpiDefault": "none",
        **_accounting(state),
        "JobAcctGatherType": "jobacct_gather/none",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=2,sched_interval=5,sched_min_interval=200000,batch_sched_delay=0",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
        "RequeueExit": "85",
        # A node that was lost comes back by itself as soon as it registers.
        "ReturnToService": "2",
        "SlurmctldTimeout": "30",
        "SlurmdTimeout": "20",
        "KillWait": "5",
        # A step that could not report its end, as the cable was out, tries again after 60 s. If the node comes back
        # meanwhile and the step may not take so long, the node is drained for it ("Kill task failed").
        "UnkillableStepTimeout": "120",
        "MinJobAge": "3600",  # a job stays known while whatever looks at it still runs, on a slow machine too
    }


EPILOG = """\
#!/bin/sh
# Ends what a job has left on this node, before Slurm lets the job or another one start. proctrack/linuxproc, unlike
# cgroups, loses sight of a process whose parent has died, such as the srun of a batch script. That one waits for its
# step, and then ends the step of this number, which by then is that of the requeued job.
for file in $(grep -lzx "SLURM_JOB_ID=$SLURM_JOB_ID" /proc/[0-9]*/environ 2>/dev/null); do
    grep -qzx "SLURMD_NODENAME=$SLURMD_NODENAME" "$file" || continue
    grep -qz "^SLURM_SCRIPT_CONTEXT=" "$file" && continue  # an epilog
    pid="${file#/proc/}"
    kill -KILL "${pid%/environ}"
done 2>/dev/null
exit 0  # any other status drains the node
"""


def epilog_file(state: State) -> Path:
    """Path of the epilog, the same on every node."""
    return state.slurm_conf.with_name("epilog")


def _listening(state: State) -> dict[str, str]:
    # slurmctld then listens at the address of its host name only, not at every address of the machine. One that has
    # joined another sandbox is known to others by the address from which slurmdbd saw it come, which is another.
    own = state.mode == "namespaces" and not state.settings.join
    return {"CommunicationParameters": "NoCtldInAddrAny"} if own else {}


def _accounting(state: State) -> dict[str, str]:
    if state.accounting is None:
        return {"AccountingStorageType": "accounting_storage/none"}
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": state.accounting.address,
        "AccountingStoragePort": str(state.accounting.port),
        # No password: the MUNGE socket for this connection, which AuthInfo does not hold for.
        "AccountingStoragePass": str(state.munge_socket),
    }


def slurmdbd_conf(state: State) -> str:
    """The whole of slurmdbd.conf; which database it is, the environment says (``accounting.environment``)."""
    assert state.accounting is not None
    user = pwd.getpwuid(os.getuid()).pw_name
    lines = {
        # slurmdbd refuses any other name than that of its host, and this.
        "DbdHost": "localhost",
        "DbdAddr": state.accounting.address,
        "DbdPort": str(state.accounting.port),
        "SlurmUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={state.munge_socket}",
        "LogFile": f"{state.directory}/log/slurmdbd.log",
        "PidFile": f"{state.directory}/run/slurmdbd.pid",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": user,
        "StorageLoc": "slurm_acct_db",
    }
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def _directories(directory: Path) -> dict[str, str]:
    return {
        "StateSaveLocation": f"{directory}/controller",
        "SlurmdSpoolDir": f"{directory}/spool/%n",
        "SlurmctldPidFile": f"{directory}/run/slurmctld.pid",
        "SlurmdPidFile": f"{directory}/run/%n.pid",
        "SlurmctldLogFile": f"{directory}/log/slurmctld.log",
        "SlurmdLogFile": f"{directory}/log/%n.log",
    }


def _nodes(state: State) -> list[str]:
    settings = state.settings
    gres = f" Gres=gpu:{settings.gpus_per_node}" if settings.gpus_per_node else ""
    size = f"CPUs={settings.cpus_per_node} RealMemory={settings.memory_gib_per_node * 1024}{gres} State=UNKNOWN"
    host = "" if state.mode == "namespaces" else f" NodeHostname={controller_name(state)}"
    return [
        f"NodeName={name}{host} NodeAddr={node.address} Port={node.port} {size}" for name, node in state.nodes.items()
    ]


def _partitions(state: State) -> list[str]:
    """One line for each partition: those before the last may be preempted, the last may not."""
    last = len(state.settings.partitions)
    lines = []
    for position, text in enumerate(state.settings.partitions, start=1):
        name, _, asked = text.partition(":")
        preempted = {"PreemptMode": "REQUEUE", "GraceTime": "10"} if position < last else {"PreemptMode": "OFF"}
        words = {"Nodes": "ALL", "Default": "YES" if position == 1 else "NO", "MaxTime": "INFINITE"}
        words |= {"PriorityTier": str(position), **preempted}
        ours = {key.lower(): key for key in words}
        for pair in filter(None, asked.split(",")):
            key, _, value = pair.partition("=")
            words[ours.get(key.lower(), key)] = value
        lines.append(f"PartitionName={name} " + " ".join(f"{key}={value}" for key, value in words.items()))
    return lines


def gpu_files(state: State) -> list[Path]:
    """The device files that stand for the GPUs, the same on every node."""
    return [state.directory / "gpu" / f"nvidia{index}" for index in range(state.settings.gpus_per_node)]


def gres_conf(state: State) -> str:
    """The whole of gres.conf: a device file for each GPU, because slurmd reports a mere count as INVAL."""
    return "".join(f"Name=gpu File={path}\n" for path in gpu_files(state))


def hosts(state: State) -> str:
    """The /etc/hosts of every node: itself, all nodes, and the controller."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost", f"{state.controller.address} ctl"]
    return "\n".join([*lines, *(f"{node.address} {name}" for name, node in state.nodes.items())]) + "\n"
