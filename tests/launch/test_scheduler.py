"""What Slurm prints is read as it is meant, also where users put ``Key=value`` into what they may choose."""

import pytest

from launch.scheduler import client
from launch.scheduler.fields import parse_fields

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


def test_values_with_blanks_end_at_the_next_key() -> None:
    line = "NodeName=n1 OS=Linux 5.15.0 #1 SMP Partitions=low,high  Reason=on fire [root@2026-01-02T03:04:05]"
    assert parse_fields(line) == {
        "NodeName": "n1",
        "OS": "Linux 5.15.0 #1 SMP",
        "Partitions": "low,high",
        "Reason": "on fire [root@2026-01-02T03:04:05]",
    }
