"""Submission to Slurm: its answers and limits, submitit's files, refused jobs, and names with odd characters."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from launch.agent.after_step import submitted_run_dirs
from launch.agent.engine import START_RANK
from launch.agent.node import Node
from launch.plan.plan import Plan, refuse_exposed
from launch.runs.folder import RunFolder
from launch.slurm import client, limits
from launch.slurm.checks import Case, check_access, check_before_submitting
from launch.slurm.client import SlurmBusyError, SlurmError
from launch.slurm.jobs import SlurmJob, agent_logs, sbatch_text
from launch.slurm.limits import SlurmFacts
from launch.slurm.submit import explain_refusal, may_have_taken, remove_unused, submit_slurm
from tests.support.commands import TINY, run
from tests.support.doctor_facts import LIMITS, request
from tests.support.planning import config_of, directives, plan, refused
from tests.support.runs import write_program

NUMBER = "71"
SBATCH = f"""#!/bin/sh
cp "$1" "$SEEN/script"
sed -n "s/^#SBATCH --\\(output\\|error\\)=//p" "$1" | while read -r path; do
  ls -d "$(dirname "$path")" >> "$SEEN/folders" || exit 1
done
echo "Submitted batch job {NUMBER}"
"""
"""As slurmd, it looks at once for the folder of the logs."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which an ``sbatch`` that starts jobs at once leaves what it was given."""
    folder, programs = tmp_path / "seen", tmp_path / "programs"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": ""}.items():
        write_program(programs / name, text)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(folder))
    return folder


def plans_of(folder: Path, count: int, *words: str) -> list[Plan]:
    return [plan(f"run_dir={folder / f'run{index}'}", *words) for index in range(count)]


def logs_named_by(script: Path, job: SlurmJob) -> list[str]:
    """Paths that Slurm makes of a batch script's patterns for a job (sbatch(1), filename pattern)."""
    number, _, element = job.job_id.partition("_")
    asked = directives(script.read_text())
    return [
        asked[key].strip("'").replace("%A", number).replace("%a", element).replace("%j", number)
        for key in ("output", "error")
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_the_folder_of_the_logs_is_there_before_sbatch_is_called(count: int, seen: Path, tmp_path: Path) -> None:
    """submitit would make a folder of each job only afterwards; slurmd fails a job whose log it cannot open.

    A process on this machine may have the number of a job: their files do not meet.
    """
    plans = plans_of(tmp_path / "sweep", count)
    local = tmp_path / "sweep" / ".submitit" / f"{NUMBER}_submitted.pkl"
    local.parent.mkdir(parents=True)
    local.write_text("of a process")
    jobs = submit_slurm(plans)
    assert local.read_text() == "of a process"
    where = str(local.parent / "slurm")
    assert (seen / "folders").read_text().splitlines() == [where, where]
    assert [job.job_id for job in jobs] == ([NUMBER] if count == 1 else [f"{NUMBER}_0", f"{NUMBER}_1"])
    for made, job in zip(plans, jobs, strict=True):
        assert submitted_run_dirs(where, Node(0, 2, "", is_slurm=True, slurm_job=job.job_id)) == [made.run_dir]
        assert list(map(str, agent_logs(made.run_dir, job, 0))) == logs_named_by(seen / "script", job)
        assert Path(where, f"{job.job_id}_submitted.pkl").stat().st_mode & 0o777 == 0o600


def test_a_folder_of_jobs_that_others_can_change_is_refused(seen: Path, tmp_path: Path) -> None:
    (made,) = plans_of(tmp_path / "sweep", 1)
    submit_slurm([made])
    refuse_exposed(Path(made.run_dir))
    (tmp_path / "sweep" / ".submitit" / "slurm").chmod(0o777)
    with pytest.raises(ValueError, match=r"\.submitit/slurm with mode 0777"):
        refuse_exposed(Path(made.run_dir))


# A Slurm that cannot take jobs.


GONE = "and there is no such file: unset SLURM_CONF"


def test_a_configuration_that_is_gone_is_named_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "slurm.conf"
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(SlurmError, match=GONE) as error:
        client.run("true")
    assert not isinstance(error.value, SlurmBusyError), "nothing that waiting would mend"
    conf.touch()
    with pytest.raises(SlurmError, match="is DOWN"):  # as scontrol ping says it: on standard output, with status 1
        client.run("sh", "-c", "echo 'Slurmctld(primary) at ctl is DOWN'; exit 1")
    assert client.run("true") == "" and client.missing_configuration() == ""
    monkeypatch.setenv("SLURM_CONF", "")
    assert client.missing_configuration() == ""


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs Slurm's commands")
@pytest.mark.parametrize("words", [(), ("launch.check_limits=false",)])
def test_a_sweep_is_refused_and_leaves_nothing_behind(words: tuple[str, ...], tmp_path: Path) -> None:
    asked = ("-m", "nodes=1,2,4", "cluster=slurm", *words)
    text = run("launch", *asked, cwd=tmp_path, status=1 if words else 2, SLURM_CONF=str(tmp_path / "gone.conf"))
    assert "found: " in text and GONE in text and "\ntype next: the same command when scontrol ping says UP" in text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], text
    if not words:
        assert list(tmp_path.iterdir()) == []
        planned = run("launch dry_run=true", *asked, cwd=tmp_path, SLURM_CONF=str(tmp_path / "gone.conf"))
        assert "the requests were not compared with Slurm's limits" in planned and planned.count("#!/bin/bash") == 3


def test_only_what_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    group = tmp_path / "sweep"
    for name in ("nodes=1", "nodes=2"):
        (group / name / ".hydra").mkdir(parents=True)
    (group / ".submitit" / "slurm").mkdir(parents=True)
    RunFolder(group / "nodes=2").record_event("submitted", cluster="slurm", job_id="7")
    remove_unused([str(group / "nodes=1"), str(group / "nodes=2")])
    assert sorted(path.name for path in group.iterdir()) == [".submitit", "nodes=2"]
    shutil.rmtree(group / "nodes=2")
    (group / "nodes=1").mkdir()
    remove_unused([str(group / "nodes=1")])
    assert not group.exists()


@pytest.mark.parametrize(
    ("said", "kind", "taken"),
    [
        ("sbatch: unrecognized option '--gresz=gpu:1'", SlurmError, False),
        ("Unable to contact slurm controller (connect failure)", SlurmBusyError, False),
        ("Socket timed out on send/recv operation", SlurmBusyError, True),
        ("invalid account or account/partition combination specified", SlurmError, False),
    ],
)
def test_a_job_that_may_have_been_taken_keeps_its_folder(said: str, kind: type[SlurmError], taken: bool) -> None:
    error = kind(f"sbatch: error: Batch job submission failed: {said}")
    assert may_have_taken(error) is taken
    refusal = explain_refusal(plan("nodes=1"), error)
    assert said in refusal.found and ("no Slurm controller takes its job" in refusal.found) is (kind is SlurmBusyError)
    assert ("python -m launch.status first" in refusal.fix) is (kind is SlurmBusyError)


# Answers of Slurm 22.05 and 24.11, repeated commands, and refusals of jobs that Slurm would never start.


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
    waits = "jobs wait there until an administrator brings it up"
    assert text.startswith(f"warning: partition closed is DOWN: {waits}, unless")
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
    assert "warning: scontrol ping: no answer in 10 s: the requests were not compared" in text
    text = run("launch cluster=slurm nodes=8 dry_run=true launch.check_limits=false", cwd=tmp_path, PATH="")
    assert "#SBATCH --nodes=8" in text and "not compared" not in text


# Names, paths and arguments with characters that mean something to a shell: they stay what they are.


ODD = """it's $(touch pwned) `touch pwned` "a=b,c"; é * # -x"""


def test_names_and_paths_in_a_batch_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bash reads the script, with ``srun`` a function that tells its arguments."""
    monkeypatch.chdir(tmp_path)
    quoted = '"{}"'.format(ODD.replace('"', '\\"'))
    words = [f"name={quoted}", f"output_dir={quoted}", f"cluster.account={quoted}", f"++cluster.srun_args=[{quoted}]"]
    made = plan(*words, "copy_code=true")
    folder = tmp_path / ODD / ODD
    assert Path(made.run_dir).parent == folder
    text = sbatch_text([made])
    assert {directives(text)[name] for name in ("job-name", "account")} == {shlex.quote(ODD)}
    assert directives(text)["output"] == shlex.quote(f"{folder}/.submitit/slurm/%j_0_log.out")
    told = r"""srun() { printf '%s\0' "$PYTHONPATH" "$@"; }"""
    done = subprocess.run(
        ["bash", "-c", f"{told}\n{text}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0 and done.stderr == ""
    path, *args = done.stdout.split("\0")[:-1]
    assert path == made.code and Path(path).parent == folder / ".code"
    logs = f"{folder}/.submitit/slurm/%j_%t_log"
    assert args[1:5] == ["--output", f"{logs}.out", "--error", f"{logs}.err"]
    assert args[5:6] == [ODD] and args[-1] == str(folder / ".submitit" / "slurm")
    assert list(tmp_path.iterdir()) == []


def test_arguments_and_folders_of_ranks(tmp_path: Path) -> None:
    workdir, logs = tmp_path / ODD, tmp_path / f"logs of {ODD}"
    for folder in (workdir, logs):
        folder.mkdir()
    args = (ODD, "$HOME", "a\nb", "--", "-n", "", "x=1,2")
    words = ("/bin/sh", "-c", START_RANK, "sh", workdir, logs, "/usr/bin/printf", r"%s\0", os.fspath(workdir), *args)
    subprocess.run(words, env={"RANK": "3"}, check=True)
    assert (logs / "rank_00003.log").read_text().split("\0")[:-1] == [str(workdir), *args]
    assert sorted(tmp_path.iterdir()) == sorted([workdir, logs]) and not list(workdir.iterdir())
