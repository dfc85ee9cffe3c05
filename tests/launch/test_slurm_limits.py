"""Answers of Slurm 22.05 and 24.11, repeated commands, and refusals of jobs that Slurm would never start."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from launch.plan.plan import Plan
from launch.slurm import client, limits
from launch.slurm.checks import Case, check_access, check_before_submitting
from launch.slurm.limits import SlurmFacts
from tests.support.commands import TINY, run
from tests.support.doctor_facts import LIMITS, request
from tests.support.planning import config_of, plan, refused
from tests.support.runs import write_program

# As Slurm 22.05 prints it, shortened.
JOB = (
    "JobId=7 JobName={name} UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=4294901757 Nice=0 Account=(null) "
    "QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "RunTime=00:00:12 TimeLimit=1-02:00:00 TimeMin=N/A StartTime=2026-01-02T03:04:05 EndTime=2026-01-03T05:04:05 "
    "PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime=None Partition=low AllocNode:Sid=login:4242 "
    "ReqNodeList=(null) ExcNodeList=n[1-2] NodeList=n3 BatchHost=n3 NumNodes=1 NumCPUs=2 NumTasks=1 CPUs/Task=2 "
    "ReqB:S:C:T=0:0:*:* TRES=cpu=2,mem=1G,node=1 Command=/home/me/a job.sh {path} WorkDir=/home/me Comment={comment} "
    "StdOut=/home/me/out Power="
)


@pytest.mark.parametrize("text", ["run", "two words", "lr=3 JobState=FAILED Restarts=9 ExcNodeList=n5 x", "Word=", ""])
def test_a_job_is_read_whatever_its_name_and_comment_say(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = JOB.format(name=text, path=text, comment=text)
    monkeypatch.setattr(client, "run", lambda *command, **options: line)
    fields = client.job_fields("7")
    assert fields["JobName"] == text
    told = ("JobState", "Restarts", "Partition", "AllocNode:Sid", "ExcNodeList", "CPUs/Task", "TRES")
    assert [fields[key] for key in told] == [
        *("RUNNING", "2", "low", "login:4242", "n[1-2]", "2", "cpu=2,mem=1G,node=1")
    ]
    details = client.job_details("7")
    assert (details.state, details.restarts, details.time_limit_s) == ("RUNNING", 2, 26 * 3600)
    assert not details.is_preempted


# Codes of Slurm's page of job reason codes, and texts that slurmctld 22.05 puts in their place.
STAYS = [
    *("PartitionNodeLimit", "PartitionTimeLimit", "PartitionConfig", "PartitionDown", "PartitionInactive"),
    *("AssocMaxNodePerJobLimit", "AssocMaxGRESPerNode", "MaxMemPerLimit", "QOSMaxGRESMinutesPerJob", "QOSMinGRES"),
    *("BadConstraints", "AccountNotAllowed", "QOSNotAllowed", "InvalidAccount", "InvalidQOS", "ReservationDeleted"),
    *("JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue", "DependencyNeverSatisfied", "DeadLine", "NodeDown"),
    "ReqNodeNotAvail, UnavailableNodes:n[3-4]",
    "ReqNodeNotAvail,_UnavailableNodes:n3",
    "Job's account not known, so it can't use this partition (phys allows phys)",
    "User's group not permitted to use this partition",
    "launch failed requeued held",
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
]
PASSES = [
    *("None", "Resources", "Priority", "Dependency", "BeginTime", "Licenses", "JobArrayTaskLimit", "Reservation", ""),
    *("Cleaning", "Prolog", "Constraints", "AssocGrpCpuLimit", "AssocMaxJobsLimit", "QOSMaxCpuPerUserLimit"),
    *("QOSGrpNodeLimit", "MaxGRESPerAccount", "ReqNodeNotAvail, Reserved for maintenance"),
]


def test_reasons_that_no_waiting_removes_come_with_what_to_type() -> None:
    assert [reason for reason in STAYS if limits.advice(reason) is None] == []
    assert [reason for reason in PASSES if limits.advice(reason) is not None] == []
    held, large = limits.advice("JobHeldUser", "12_3", "run"), limits.advice("PartitionNodeLimit", "7", "'a b'")
    assert held is not None and held.found.startswith("waiting does not change JobHeldUser: ")
    assert held.fix == "scontrol release 12_3"
    assert large is not None and "python -m launch.cancel 'a b'" in large.fix


@pytest.mark.parametrize(
    "line",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (receive failure)",
        "scontrol: error: Slurm backup controller in standby mode",
        "",  # As squeue of 24.11 ends, which says nothing where the controller hangs up.
    ],
)
def test_a_controller_that_does_not_answer_at_once_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    asked = tmp_path / "asked"
    fail = f'echo "{line}" >&2; exit 1' if line else "kill -PIPE $$"
    text = f"#!/bin/sh\nif [ -e {asked} ]; then echo answer; else touch {asked}; {fail}; fi\n"
    write_program(tmp_path / "scontrol", text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    with pytest.raises(client.SlurmBusyError, match=line.split(": ")[-1].split(" (")[0] or "SIGPIPE"):
        client.run("scontrol", "show", "job", "7", retries=1)
    assert client.run("scontrol", "show", "job", "7").strip() == "answer"


# Slurm 24.11, on a cluster without accounting.


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
KELP = limits.parse_limits(CONFIG, PARTITION, NODE)


def test_partitions_and_nodes_are_read() -> None:
    assert KELP.number("MinJobAge") == 60
    (partition,), (node,) = KELP.partitions, KELP.nodes
    assert (partition.name, partition.max_time_min, partition.memory_per_cpu_mb) == ("express", 30, 1000)
    assert partition.total_nodes == 4 and not partition.is_default and partition.qos is None
    assert (node.name, node.cpus, node.memory_mb, node.is_usable) == ("kelp01", 32, 64000, True)
    assert node.partitions == ("long", "express") and not node.gres
    assert not KELP.has_accounting
    assert limits.how_preempted(KELP, replace(partition, preempt_mode="REQUEUE")) == "OFF", "a plugin that is null"


def test_without_accounting_no_account_is_a_default() -> None:
    partition = replace(KELP.partitions[0], allow_accounts=("physics",))
    (finding,) = check_access(Case(KELP, partition, request("nodes=1")))
    assert finding.level.name == "error" and finding.fix == "cluster.account=physics"


# Checks of a command before it submits.


SEEN = SlurmFacts(limits=LIMITS)


def look(*points: tuple[str, ...], seen: SlurmFacts = SEEN) -> tuple[list[Plan], str]:
    """The plans that are left of these points, and what was printed."""
    configs = [config_of("cluster=slurm", *TINY, *words) for words in points]
    console = Console(file=StringIO(), width=1000, record=True)
    plans = check_before_submitting(seen, [plan(*TINY, *words) for words in points], configs, console)
    return plans, console.export_text()


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["nodes=8"], "which Slurm would never start: nodes=8 in partition low: it has 3", "nodes=3;"),
        (["cluster.partition=lwo"], "cluster.partition=lwo, and there are low, short", "cluster.partition=low;"),
        (["cluster.partition=short"], "MaxTime of short is 30 min", "cluster.timeout_min=30;"),
    ],
)
def test_what_could_never_start_is_refused_with_what_fits(words: list[str], found: str, fix: str) -> None:
    refusal = refused(look, ("nodes=1", "seed=3"), tuple(words), found=found, fix=fix)
    assert "launch.check_limits=false" in refusal.fix
    low = "partition low: at most 3 nodes for 1440 min, each of up to 8 CPUs, 256 GiB of memory, gpu:2, gpu:a100:4"
    short = "partition short: at most 2 nodes for 30 min, each of up to 8 CPUs"
    assert (short if words == ["cluster.partition=short"] else low) in refusal.expected


def test_spares_are_given_up_before_nodes_and_the_advice_suits_the_largest_point() -> None:
    for points, fix in (
        ((("nodes=2", "spare_nodes=3"),), "spare_nodes=1;"),
        ((("nodes=1", "spare_nodes=3"), ("nodes=3", "spare_nodes=3", "optim.global_batch=12")), "spare_nodes=0;"),
        ((("nodes=8", "spare_nodes=1"),), "nodes=2;"),
        ((("nodes=1",), ("nodes=8",)), "nodes=3;"),
    ):
        assert refused(look, *points).fix.startswith(fix), points


def test_what_is_in_doubt_is_submitted_with_a_warning() -> None:
    assert look(("nodes=1",), ("nodes=2", "cluster.mem_gb=200"))[1] == "", "what fits passes without a word"
    plans, text = look(("cluster.partition=closed",))
    assert plans[0].slurm["partition"] == "closed"
    assert text.startswith("warning: partition closed is DOWN: jobs wait there until somebody brings it up, unless")
    listed = "cluster.placement=[{partition: closed}, {partition: low}]"
    plans, text = look((listed,))
    assert plans[0].slurm["partition"] == "low" and "partition=closed is skipped" in text
    plans, text = look(("cluster.placement=[{partition: closed}, {partition: nowhere}]",))
    assert plans[0].slurm["partition"] == "closed" and "partition=nowhere is skipped" in text


def test_a_limit_that_a_qos_may_lift_is_a_warning_before_the_submission() -> None:
    plans, text = look(("cluster.partition=short", "cluster.timeout_min=60", "cluster.qos=long"))
    assert plans[0].slurm["partition"] == "short" and text.startswith("warning: cluster.timeout_min=60")
    assert "unless QOS long lifts it" in text


def test_a_controller_that_does_not_answer_refuses_nothing(tmp_path: Path) -> None:
    plans, text = look(("nodes=8",), seen=replace(SEEN, limits=None, slurm_problem="scontrol ping: no answer in 10 s"))
    assert len(plans) == 1
    assert "warning: scontrol ping: no answer in 10 s: what is asked of Slurm was not compared" in text
    text = run("launch cluster=slurm nodes=8 dry_run=true launch.check_limits=false", cwd=tmp_path, PATH="")
    assert "#SBATCH --nodes=8" in text and "was not compared" not in text
