"""A recorded cluster and a sound login node, for the tests of the doctor's checks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from launch.config import ClusterKind
from launch.doctor.__main__ import configs_of
from launch.doctor.findings import Facts, Folder
from launch.plan.plan import make_plan
from launch.slurm import checks as asked
from launch.slurm import limits
from launch.slurm.checks import Finding, Level, Request
from launch.slurm.jobs import sbatch_text

# Printed by scontrol 22.05.8 of the sandbox, unimportant fields left out.
CONFIG = """Configuration data as of 2026-11-21T07:25:34
AccountingStorageType   = accounting_storage/none
ClusterName             = sandbox
DefMemPerNode           = UNLIMITED
JobDefaults             = (null)
JobRequeue              = 1
KillWait                = 5 sec
MaxMemPerNode           = UNLIMITED
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
PropagateResourceLimits = ALL
PropagateResourceLimitsExcept = (null)
SelectTypeParameters    = CR_CPU
SLURM_VERSION           = 22.05.8
TaskPlugin              = task/none

Slurmctld(primary) at ctl is UP
"""
PARTITION = (
    "PartitionName={name} AllowGroups={groups} AllowAccounts={accounts} AllowQos=ALL AllocNodes=ALL Default={default} "
    "QoS=N/A GraceTime={grace} MaxNodes={max_nodes} MaxTime={max_time} MinNodes=0 MaxCPUsPerNode=UNLIMITED "
    "Nodes=n[1-3] PriorityTier={tier} OverSubscribe=NO PreemptMode={preempt} State={state} TotalNodes=3 "
    "{memory} MaxMemPerNode=UNLIMITED TRES=cpu=24,mem=768G,node=3,billing=24\n"
)
COMMON = {"groups": "ALL", "accounts": "ALL", "default": "NO", "grace": 0, "max_nodes": "UNLIMITED", "tier": 9}
COMMON |= {"max_time": "1-00:00:00", "preempt": "OFF", "state": "UP", "memory": "DefMemPerNode=UNLIMITED"}
PARTITIONS = "".join(
    PARTITION.format(**{**COMMON, **different})
    for different in (
        {"name": "low", "default": "YES", "grace": 10, "preempt": "REQUEUE", "tier": 1},
        {"name": "short", "max_time": "00:30:00", "max_nodes": 2},
        {"name": "physics", "accounts": "phys,chem", "groups": "staff"},
        {"name": "closed", "state": "DOWN"},
        {"name": "small", "memory": "DefMemPerCPU=1000"},
    )
)
NODE = (
    "NodeName={name} Arch=x86_64 CPUAlloc=0 CPUEfctv=8 CPUTot=8 AvailableFeatures={features} Gres={gres} "
    "NodeAddr=10.0.0.1 OS=Linux 6.18.44 #1 SMP PREEMPT_DYNAMIC @0  RealMemory=262144 State={state} ThreadsPerCore=1 "
    "Partitions=low,short,physics,closed,small BootTime=2026-11-21T06:16:26 CfgTRES=cpu=8,mem=256G "
    "AllocTRES= {reason}\n"
)
NODES = "".join(
    NODE.format(name=name, features=features, gres=gres, state=state, reason=reason)
    for name, features, gres, state, reason in (
        ("n1", "fast,new", "gpu:a100:4(S:0-1)", "IDLE", ""),
        ("n2", "fast", "gpu:a100:4(S:0-1)", "MIXED+DRAIN", "Reason=bad fan [root@2026-11-20T10:00:00]"),
        ("n3", "(null)", "gpu:2", "IDLE", ""),
    )
)
LIMITS = limits.parse_limits(CONFIG, PARTITIONS, NODES)
OUTPUT = Folder("/home/ada/outputs", "/home/ada", "nfs4", free_bytes=2**40)
FACTS = Facts(
    kind=ClusterKind.slurm,
    client=True,
    output=OUTPUT,
    programs=(Folder("/home/ada/.venv", "/home/ada/.venv", "nfs4"),),
    threads=None,
    open_files=65536,
    locked_bytes=-1,
    executable="/home/ada/.venv/bin/python",
    torch="2.13.0+cpu",
    limits=LIMITS,
)
CALM = ("cluster=slurm", "cluster.cpus_per_task=4", "cluster.mem_gb=16", "optim.global_batch=96")


@cache
def request(*words: str) -> Request:
    """Request of a point with these words."""
    (config,) = configs_of([[*CALM, *words]])
    plan = make_plan(config, list(words), ClusterKind.slurm)
    return Request(config, plan, (plan.point,), sbatch_text([plan]))


def complaints(seen: Facts, *words: str) -> list[Finding]:
    """All warnings and errors about a request."""
    assert seen.limits is not None
    found = asked.check_request(seen.limits, request(*words))
    return [f for f in found if f.level is not Level.ok]


def with_config(**changed: str) -> Facts:
    """The recorded cluster with other lines in slurm.conf."""
    return replace(FACTS, limits=replace(LIMITS, config={**LIMITS.config, **changed}))
