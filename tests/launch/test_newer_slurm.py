"""Answers of Slurm 24.11, recorded on a cluster without accounting, read as those of 22.05 are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.slurm import limits
from launch.slurm.request import check_access, check_accounting
from tests.support.doctor_facts import request

# Printed by scontrol 24.11.5, unimportant fields left out.
CONFIG = """Configuration data as of 2026-11-23T06:20:27
AccountingStorageType   = (null)
CliFilterPlugins        = (null)
ClusterName             = kelp
JobSubmitPlugins        = (null)
KillWait                = 15 sec
MinJobAge               = 60 sec
PreemptMode             = OFF
PreemptType             = (null)
SelectType              = select/cons_tres
SelectTypeParameters    = CR_CORE_MEMORY
SLURM_VERSION           = 24.11.5

Slurmctld(primary) at head is UP
"""
PARTITION = """PartitionName=express AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A \
DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO ExclusiveTopo=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED \
MaxTime=00:30:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED Nodes=kelp[01-04] \
PriorityJobFactor=1 PriorityTier=10 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF \
State=UP TotalCPUs=128 TotalNodes=4 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerCPU=1000 \
MaxMemPerNode=UNLIMITED TRES=cpu=128,mem=250G,node=4,billing=128
"""
NODE = """NodeName=kelp01 Arch=x86_64 CoresPerSocket=8  CPUAlloc=32 CPUEfctv=32 CPUTot=32 CPULoad=115.99 \
AvailableFeatures=(null) ActiveFeatures=(null) Gres=(null) NodeAddr=kelp01 NodeHostName=kelp01 Version=24.11.5 \
OS=Linux 6.18.44 #1 SMP PREEMPT_DYNAMIC @0  RealMemory=64000 AllocMem=32000 FreeMem=5665 Sockets=2 Boards=1 \
State=ALLOCATED ThreadsPerCore=2 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A Partitions=long,express  \
BootTime=2026-11-22T16:33:31 SlurmdStartTime=2026-11-23T06:15:56 LastBusyTime=2026-11-23T06:15:56 \
ResumeAfterTime=None CfgTRES=cpu=32,mem=62.50G,billing=32 AllocTRES=cpu=32,mem=32000M CurrentWatts=0 AveWatts=0
"""
KELP = limits.parse(CONFIG, PARTITION, NODE)


def test_partitions_and_nodes_are_read() -> None:
    assert KELP.version == (24, 11) and KELP.number("MinJobAge") == 60
    (partition,), (node,) = KELP.partitions, KELP.nodes
    assert (partition.name, partition.max_time_min, partition.memory_per_cpu_mb) == ("express", 30, 1000)
    assert partition.total_nodes == 4 and not partition.is_default and partition.qos is None
    assert (node.name, node.cpus, node.memory_mb, node.is_usable) == ("kelp01", 32, 64000, True)
    assert node.partitions == ("long", "express") and not node.gres


def test_a_cluster_without_accounting_is_known_as_one() -> None:
    assert not KELP.has_accounting
    (finding,) = check_accounting(KELP)
    assert finding.found.startswith("none here")


def test_a_plugin_that_is_null_preempts_nothing() -> None:
    (partition,) = KELP.partitions
    assert limits.how_preempted(KELP, replace(partition, preempt_mode="REQUEUE")) == "OFF"


@pytest.mark.parametrize("kind", ["(null)", "accounting_storage/none"])
def test_without_accounting_no_account_is_a_default(kind: str) -> None:
    seen = limits.parse(CONFIG.replace("Type   = (null)", f"Type   = {kind}"), PARTITION, NODE)
    partition = replace(seen.partitions[0], allow_accounts=("physics",))
    (finding,) = check_access(seen, partition, request("nodes=1"), None)
    assert finding.level.name == "error" and finding.fix == "cluster.account=physics"
