"""The cause of a failed or hanging run in one sentence: on real runs, and for each rule of the table."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.report import build
from launch.runs.environment import DUMP_PREFIX
from launch.runs.events import select_events
from launch.runs.folder import RunFolder, append_json_lines
from launch.slurm.client import JobState
from launch.why.__main__ import main
from launch.why.facts import job_event, read_dump
from launch.why.rules import RULES, find_verdict
from tests.support.commands import ROOT, call, kill_all, python, run, start_fork, wait_for
from tests.support.runs import COUNTING, PROGRAM, names, recorded

FAULTY = ROOT / "tests" / "support" / "programs" / "faulty.py"
TWO_RANKS = ("cluster=local", "nodes=1", "ranks_per_node=2", "launch.poll_s=1", "launch.report_files=[md]")
LIMITS = ("resilience.hang_timeout_s=5", "resilience.heartbeat_timeout_s=5")


def run_faulty(fault: str, folder: Path, status: int) -> tuple[str, RunFolder]:
    """Run two ranks of which rank 1 has a fault in step 4; what the command printed, and the run folder."""
    words = ("workload=script", f"script.path={FAULTY}", f"script.args='{fault} 4 1 {folder}'", *TWO_RANKS, *LIMITS)
    text = run(f"launch run_dir={folder / 'run'}", *words, cwd=folder, status=status, PYTHONPATH=str(ROOT))
    return text, RunFolder(folder / "run")


def line_with(text: str) -> str:
    """Return the place in the program whose line has ``text``."""
    (number,) = (i for i, line in enumerate(FAULTY.read_text().splitlines(), 1) if text in line)
    return f"{FAULTY.name}:{number}"


REDUCE = line_with("dist.all_reduce(gradient)")
REAL = {
    "exit": ("exit_status", "rank 1 on {host} failed first after step 3: exit status 3"),
    "missing_file": ("missing_file", "rank 1 on {host} failed first after step 3: FileNotFoundError"),
    "leave": (
        *("left_early", f"rank 0 on {{host}} waits in all_reduce ({REDUCE}) since step 4 for rank 1 on {{host}}, "),
        "which left with exit status 0",
    ),
    "size": ("mismatched_collective", "", "its collective does not match those of other ranks"),
    "deadlock": (
        *("deadlock", f"rank 0 on {{host}} waits in all_reduce ({REDUCE}) since step 4 for rank 1 on {{host}}, "),
        f"which is in take_locks_in_two_orders ({line_with('b_lock.acquire()')}): a lock",
    ),
}


@pytest.mark.parametrize("fault", REAL)
def test_a_failed_command_ends_with_the_cause_in_one_sentence(fault: str, tmp_path: Path) -> None:
    text, folder = run_faulty(fault, tmp_path, status=1)
    kind, begin, *parts = REAL[fault]
    (told,) = select_events(folder.read_events(), "verdict")
    assert told["kind"] == kind, text
    sentence = told["cause"]
    assert sentence.startswith(begin.format(host=os.uname().nodename)) and all(part in sentence for part in parts)
    assert "\n" not in sentence
    assert text.rstrip().splitlines()[-2:] == [f"why: {sentence}", f"type next: {told['fix']}"]
    answer = call(main, folder.path)
    assert f"why: {sentence}" in answer and str(folder.log(1, 1)) in answer and kind in answer
    assert f"why: {sentence}" in run("launch.status", str(folder.path), cwd=tmp_path)
    assert any(sentence in note for note in build(folder.path).notes)


def test_a_finished_run_has_no_verdict(tmp_path: Path) -> None:
    text, folder = run_faulty("none", tmp_path, status=0)
    assert "why:" not in text and "verdict" not in names(folder)
    assert "no verdict: it is finished" in run("launch.why", str(folder.path), cwd=tmp_path)
    assert find_verdict(folder) is None


def test_a_hang_that_the_agents_have_not_found_yet_is_explained_by_live_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hang := tmp_path / "hang").touch()
    args = f"script.args='--hang {hang} --save-every 5'"
    words = [*COUNTING, args, *TWO_RANKS, f"run_dir={tmp_path / 'run'}"]
    process = start_fork("launch", *words, cwd=tmp_path, log=tmp_path / "log", PYTHONPATH=str(ROOT))
    try:
        folder = RunFolder(tmp_path / "run")
        wait_for(
            lambda: '"step": 5' in folder.metrics(0).read_text() if folder.metrics(0).exists() else False, "a save"
        )
        for name in ("QUIET_S", "QUIET_STEPS"):
            monkeypatch.setattr(f"launch.slurm.status.{name}", 0)
        text = call(main, folder.path)
    finally:
        hang.unlink()
        kill_all(process)
    assert f"is in save ({PROGRAM.name}:" in text and "not network" in text, text


# Each rule, on event logs that are written by hand.


STACK = """Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 9 in wait

Current thread 0x00007f02 (most recent call first):
{}
"""
IN_REDUCE = STACK.format(
    '  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce\n'
    '  File "/x/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper\n'
    '  File "/home/me/train.py", line 40 in step'
)
IN_BARRIER = IN_REDUCE.replace("all_reduce", "barrier").replace("line 40", "line 41")
IN_DATA = STACK.format(
    '  File "/x/site-packages/torch/utils/data/dataloader.py", line 700 in __next__\n'
    '  File "/home/me/dataset.py", line 88 in batches'
)
IN_LOCK = STACK.format('  File "/usr/lib/python3.11/threading.py", line 1 in join\n  File "/home/me/a.py", line 7 in f')
IN_CODE = STACK.format('  File "/home/me/a.py", line 9 in g')


JOINED = "\n\nThe above exception was the direct cause of the following exception:\n\n"
HANDLED = "\n\nDuring handling of the above exception, another exception occurred:\n\n"


def raises(rank: int, *errors: str, joint: str = JOINED, line: str = "run()", **more: Any) -> dict[str, Any]:
    """A rank whose log ends with a traceback of these exceptions, causes first."""
    head = f'Traceback (most recent call last):\n  File "/home/me/a.py", line 9, in <module>\n    {line}\n'
    trace = joint.join(head + error for error in errors)
    return failed(rank, f"{errors[-1].splitlines()[0]} (exit status 1)", traceback=trace, **more)


def waits(state: str, file: str = "/home/me/a.py") -> list[dict[str, Any]]:
    """Rank 0 waits in a collective for rank 1, whose process is in ``state``."""
    return [hung(0, IN_REDUCE), hung(1, STACK.format(f'  File "{file}", line 9 in g'), state=state)]


def failed(rank: int, cause: str, **more: Any) -> dict[str, Any]:
    return {"event": "rank_failed", "attempt": 1, "rank": rank, "host": f"n{rank}", "cause": cause, "step": 7, **more}


def hung(rank: int, stack: str, state: str = "S futex_do_wait", **more: Any) -> dict[str, Any]:
    more = {"since": 10.0 - rank, **more}
    return failed(rank, "hung: no progress for 5 s while training", traceback=stack, hung=True, state=state, **more)


LOST = {"echo": True, "cause": "RuntimeError: Connection closed by peer", "traceback": IN_REDUCE}
LEFT = {"event": "rank_left", "attempt": 1, "rank": 1, "host": "n1", "left": True}


def ended(cause: str) -> dict[str, Any]:
    return {"event": "attempt_ended", "attempt": 1, "cause": cause}


WAITS = "rank 0 on n0 waits in all_reduce (train.py:40) since step 7"
TABLE: list[tuple[str, list[dict[str, Any]], str]] = [
    ("refused", [{"event": "start_refused", "cause": "found: no disk"}], "the ranks were not started: found: no disk"),
    (
        "refused",
        [{"event": "start_refused", "cause": "found: no disk\nexpected: one\ntype next: mount it"}],
        "the ranks were not started: no disk\ntype next: mount it",
    ),
    ("node_lost", [{"event": "node_lost", "attempt": 1, "host": "n7", "cause": "no message"}], "node n7 was lost"),
    ("node_lost", [job_event("NODE_FAIL")], "Slurm: NODE_FAIL"),
    ("oom_kill", [job_event("OUT_OF_MEMORY")], "Slurm: OUT_OF_MEMORY"),
    ("time_limit", [job_event("TIMEOUT")], "time limit"),
    ("time_limit", [ended("timed_out")], "time limit"),
    ("preempted", [job_event("PREEMPTED")], "preempted"),
    ("bit_flip", [{"event": "replicas_differ", "cause": "rank 5 differs", "hosts": ["n5"]}], "rank 5 differs"),
    ("full_disk", [failed(1, "OSError: [Errno 28] No space left on device")], "rank 1 on n1 failed first after step 7"),
    ("gpu_memory", [failed(1, "OutOfMemoryError: CUDA out of memory.")], "CUDA out of memory"),
    ("oom_kill", [failed(1, "killed by SIGKILL, out of memory: the kernel")], "killed by SIGKILL"),
    ("memory_error", [failed(1, "MemoryError")], "MemoryError"),
    ("mismatched_collective", [failed(1, "killed by SIGABRT: op.preamble.length <= op.nbytes")], "does not match"),
    (
        "dead_loader_worker",
        [failed(1, "RuntimeError: DataLoader worker (pid 7) exited unexpectedly")],
        "a worker process died",
    ),
    ("crash", [failed(1, "killed by SIGSEGV")], "a crash in compiled code"),
    ("missing_file", [failed(1, "FileNotFoundError: [Errno 2] No such file or directory: 'x'")], "'x'"),
    ("killed", [failed(1, "killed by SIGKILL")], "by a process outside of the run"),
    ("exit_status", [failed(1, "exit status 3")], "exit status 3"),
    (
        "exception",
        [failed(0, **LOST), failed(1, "KeyError: 'a'", traceback='  File "/m/a.py", line 3, in f\n')],
        "(a.py:3)",
    ),
    ("left_early", [failed(0, **LOST), LEFT], f"{WAITS} for rank 1 on n1, which left with exit status 0"),
    ("stopped", [{**hung(1, IN_CODE), "cause": "stopped: the process has not run for 9 s"}], "rank 1 on n1 is stopped"),
    ("gil_held", [{**hung(1, IN_CODE), "cause": "frozen: the process has not run for 9 s"}], "is in g (a.py:9)"),
    (
        *("data", [hung(0, IN_REDUCE), hung(1, IN_DATA)]),
        f"{WAITS} for rank 1 on n1, which is in batches (dataset.py:88): data, not network",
    ),
    ("deadlock", [hung(0, IN_REDUCE), hung(1, IN_LOCK)], f"{WAITS} for rank 1 on n1, which is in f (a.py:7): a lock"),
    (
        "slow_disk",
        [hung(0, IN_REDUCE), hung(1, IN_CODE, state="D nfs_wait")],
        f"{WAITS} for rank 1 on n1, which is in g",
    ),
    ("slow_cpu", [hung(0, IN_REDUCE), hung(1, IN_CODE, state="R 0")], "it computes"),
    ("elsewhere", [hung(0, IN_REDUCE), hung(1, IN_CODE)], "not network"),
    ("mismatched_collective", [hung(0, IN_REDUCE), hung(1, IN_BARRIER)], f"{WAITS} and rank 1 on n1 waits in barrier"),
    ("network", [hung(0, IN_REDUCE), hung(1, IN_REDUCE)], "ranks 0-1 wait in all_reduce (train.py:40) since step 7"),
    ("network", [failed(0, **LOST), failed(1, **LOST)], "ranks 0-1 wait in all_reduce"),
    ("unknown", [failed(0, **LOST)], "unknown: rank 0 on n0 failed first"),
    ("unknown", [hung(0, ""), hung(1, IN_REDUCE)], "unknown: rank 1"),
    ("unknown", [ended("crashed")], "unknown: crashed, and no rank recorded why"),
    # What libraries really say.
    *(
        ("full_disk", [raises(1, error)], "a filesystem is full")
        for error in (
            "OSError: [Errno 122] Disk quota exceeded",
            "OSError: 1048576 requested and 1048048 written",
            "OSError: Not enough free space to write 134217728 bytes after offset 0",
            "sqlite3.OperationalError: database or disk is full",
            "OSError: [Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device",
            "RuntimeError: write(): fd 3 failed with No space left on device",
            "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
            "safetensors._safetensors_rust.SafetensorError: Error while serializing: I/O error: (os error 28)",
        )
    ),
    ("full_disk", [failed(1, "killed by SIGABRT: [enforce fail] . unexpected pos 704 vs 598")], "SIGABRT"),
    (
        "full_disk",
        [
            raises(
                1, "OSError: [Errno 28] No space left on device", "ValueError: Can't close the ZIP file", joint=HANDLED
            )
        ],
        "ValueError",
    ),
    *(
        ("memory_error", [raises(1, *errors)], "no memory")
        for errors in (
            ["numpy._core._exceptions._ArrayMemoryError: Unable to allocate 128. TiB for an array"],
            ["pyarrow.lib.ArrowMemoryError: malloc of size 8589934592 failed"],
            ["RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"],
            ["OSError: [Errno 12] Cannot allocate memory", "RuntimeError: the cache was not made"],
        )
    ),
    ("memory_error", [failed(1, "killed by SIGABRT: std::bad_alloc")], "no memory"),
    ("gpu_memory", [raises(1, "torch.AcceleratorError: CUDA error: out of memory")], "out of memory"),
    (
        "full_disk",
        [
            raises(
                1,
                "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled system error\n"
                "Last error:\nError while creating shared memory segment /dev/shm/nccl-x: No space left on device (28)",
                echo=True,
            )
        ],
        "NCCL",
    ),
    *(
        ("dead_loader_worker", [raises(1, error)], "a worker process died")
        for error in (
            "concurrent.futures.process.BrokenProcessPool: A process in the process pool was terminated abruptly",
            "joblib.externals.loky.process_executor.TerminatedWorkerError: A worker process was terminated",
            "RuntimeError: One of the subprocesses has abruptly died during map operation.",
        )
    ),
    *(
        ("missing_file", [raises(1, *errors)], "rank 1 on n1 failed first")
        for errors in (
            ["FileNotFoundError: /data/x.parquet"],
            ["sqlite3.OperationalError: unable to open database file"],
            ["OSError: libnone.so: cannot open shared object file: No such file or directory"],
            ["FileNotFoundError: [Errno 2] No such file or directory: 'index.json'", "RuntimeError: no data set"],
            [
                "FileNotFoundError: Caught an error in worker 0.\nOriginal Traceback (most recent call last):\n"
                '  File "/home/me/data.py", line 6, in __getitem__\nFileNotFoundError: [Errno 2]'
            ],
        )
    ),
    (
        "exception",
        [raises(1, "FileNotFoundError: [Errno 2] No such file: 'cache'", "KeyError: 'vocabulary'", joint=HANDLED)],
        "KeyError",
    ),
    ("exit_status", [failed(1, "FileNotFoundError: x (exit status 3)")], "the program chose this status"),
    ("exception", [raises(1, "__main__.f.<locals>.Odd: a value")], "Odd: a value"),
    ("exception", [raises(1, "KeyError: 'nan'")], "KeyError"),
    ("missing_file", [raises(1, "FileNotFoundError: [Errno 2] No such file or directory: '/data/inf/x'")], "/data/inf"),
    ("crash", [failed(1, "killed by SIGBUS")], "a mapped file was cut off"),
    *(
        ("network", [raises(1, error, echo="efused" in error)], "a connection of the program's own")
        for error in (
            "botocore.exceptions.EndpointConnectionError: Could not connect to the endpoint URL",
            "ConnectionRefusedError: [Errno 111] Connection refused",
            "TimeoutError: timed out",
            "urllib.error.URLError: <urlopen error [Errno -2] Name or service not known>",
            "requests.exceptions.ConnectionError: HTTPConnectionPool(host='h', port=9): Max retries exceeded",
        )
    ),
    # The server of the connection has failed.
    ("exception", [raises(0, "KeyError: 'a'"), raises(1, "ConnectionResetError: reset by peer", echo=True)], "rank 0"),
    # States of processes, from a kernel 6.18; older kernels say flock_lock_inode_wait and pipe_read.
    ("deadlock", waits("S locks_lock_inode_wait /data/lock"), "a lock of a file (/data/lock)"),
    ("deadlock", waits("S fcntl_setlk /data/lock"), "which another process holds"),
    ("network", waits("S wait_woken socket:[808845]"), "a connection of the program's own"),
    ("network", waits("S wait_woken"), "a connection of the program's own"),
    ("network", waits("S __skb_wait_for_more_packets socket:[7]"), "a connection of the program's own"),
    ("network", waits("S poll_schedule_timeout.constprop.0", "/usr/lib/python3.11/ssl.py"), "of the program's own"),
    ("elsewhere", waits("S wait_woken /dev/ptmx"), "not network"),
    ("elsewhere", waits("S hrtimer_nanosleep"), "not network"),
    ("elsewhere", waits("S do_wait"), "another process of the program"),
    ("elsewhere", waits("S anon_pipe_read pipe:[809087]"), "another process of the program"),
    ("elsewhere", waits("S unix_stream_read_generic socket:[809084]"), "another process"),
    ("elsewhere", waits("S poll_schedule_timeout", "/usr/lib/python3.11/subprocess.py"), "another process"),
    ("deadlock", waits("S anon_pipe_read", "/usr/lib/python3.11/multiprocessing/queues.py"), "a lock, queue"),
    ("slow_cpu", waits("R 0", "/usr/lib/python3.11/queue.py"), "it computes"),
    ("slow_disk", waits("D folio_wait_bit_common /data/tokens.bin"), "a file (/data/tokens.bin), not network"),
    (
        "slow_disk",  # a page of a mapped file, for which the rank holds the GIL
        [
            hung(0, IN_REDUCE),
            {**hung(1, "", state="D folio_wait_bit_common"), "cause": "frozen: the process has not run for 9 s"},
        ],
        "rank 0 on n0 waits in all_reduce",
    ),
    *(
        (
            "stopped",
            [hung(0, IN_REDUCE), {**hung(1, "", state=state), "cause": "frozen: the process has not run for 9 s"}],
            "rank 1 on n1 is stopped",
        )
        for state in ("D __refrigerator", "S do_freezer_trap")
    ),
    (
        "unknown",
        [hung(0, IN_REDUCE), {**hung(1, "", state="R 0"), "cause": "frozen: the process has not run for 9 s"}],
        "unknown: rank 1",
    ),
]


def folder_with(path: Path, events: list[dict[str, Any]]) -> RunFolder:
    """A run folder of one attempt of two ranks with these events."""
    folder = RunFolder(path)
    folder.attempt(1).mkdir(parents=True)
    log = {"log": "the log", "traceback": ""}
    known = [{**log, **event} if event["event"] == "rank_failed" else event for event in events]
    return recorded(folder, {"event": "started", "attempt": 1, "world_size": 2}, *known)


@pytest.mark.parametrize(("kind", "events", "part"), TABLE, ids=[f"{i}-{row[0]}" for i, row in enumerate(TABLE)])
def test_facts_and_their_verdict(kind: str, events: list[dict[str, Any]], part: str, tmp_path: Path) -> None:
    verdict = find_verdict(folder_with(tmp_path / "run", events))
    assert verdict is not None and verdict.kind == kind, verdict
    assert part in str(verdict)
    assert not re.search(r"\{|None", verdict.sentence + verdict.fix)
    assert len(verdict.evidence) > 0 and all(text for text, _ in verdict.evidence)


def test_a_wait_for_an_asynchronous_collective_is_no_lock(tmp_path: Path) -> None:
    (program := tmp_path / "train.py").write_text("work = dist.all_reduce(x, async_op=True)\nwork.wait()\n")
    stack = STACK.format(f'  File "{program}", line 2 in step')
    verdict = find_verdict(folder_with(tmp_path / "run", [hung(0, stack), hung(1, IN_CODE, state="R 0")]))
    assert verdict is not None and (verdict.kind, verdict.rank) == ("slow_cpu", 1)
    assert "rank 0 on n0 waits in an asynchronous collective (train.py:2)" in verdict.sentence


def test_the_table_above_has_every_kind_of_rule_with_a_sentence() -> None:
    assert {rule.kind for rule in RULES} == {row[0] for row in TABLE} | {"not_finite"}


@pytest.mark.parametrize("cause", ["finished", "cancelled", "budget"])
def test_an_end_that_somebody_wanted_has_no_verdict(cause: str, tmp_path: Path) -> None:
    assert find_verdict(folder_with(tmp_path / "run", [failed(0, "killed by SIGTERM"), ended(cause)])) is None


@pytest.mark.parametrize(
    "event",
    [
        raises(0, "AssertionError", line="assert torch.isfinite(loss)"),
        raises(0, "ValueError: Expected parameter loc, but found invalid values:\ntensor([nan])"),
        raises(0, "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0"),
        raises(0, "ValueError: cannot convert float NaN to integer"),
        raises(0, "FloatingPointError: the loss is nan", "RuntimeError: stopped"),
    ],
    ids=lambda event: event["cause"][:20],
)
def test_a_number_that_is_not_finite_is_named(event: dict[str, Any], tmp_path: Path) -> None:
    verdict = find_verdict(folder_with(tmp_path / "run", [event]))
    assert verdict is not None and verdict.kind == "not_finite", verdict


def test_the_first_rank_with_a_loss_that_is_not_finite_is_blamed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "run", [failed(0, "FloatingPointError: the loss is nan")])
    for rank, first in ((0, 6), (1, 5)):
        losses = [float("nan") if step >= first else 1.0 for step in range(1, 9)]
        append_json_lines(
            folder.metrics(rank), [{"step": i, "attempt": 1, "loss": loss} for i, loss in enumerate(losses, 1)]
        )
    verdict = find_verdict(folder)
    assert verdict is not None and (verdict.kind, verdict.rank, verdict.step) == ("not_finite", 1, 5)


def test_a_clock_that_jumps_back_is_evidence(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "run", [{**failed(0, "KeyError: 1"), "time": 1.0}])
    verdict = find_verdict(folder)
    assert verdict is not None and any("a clock jumped" in text for text, _ in verdict.evidence)


DUMP = """
import sys
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
for rank in (1, 0):  # rank 1 is one collective behind
    dist.all_reduce(torch.ones(8))
    open(f"{sys.argv[2]}{rank}", "wb").write(_dump_fr_trace())
"""


def test_the_flight_recorder_names_the_rank_that_is_behind_and_its_group(tmp_path: Path) -> None:
    """Dumps of torch itself, without any stack."""
    echo = "DistBackendError: NCCL watchdog timed out"
    folder = folder_with(tmp_path / "run", [failed(rank, echo, echo=True) for rank in (0, 1)])
    python(DUMP, tmp_path, folder.attempt(1) / DUMP_PREFIX, cwd=tmp_path, TORCH_FR_BUFFER_SIZE="100")
    known = read_dump(folder.attempt(1) / f"{DUMP_PREFIX}0")
    assert (known["name"], known["group"], known["seq"], known["sizes"]) == ("all_reduce", "default_pg", 2, [[8]])
    verdict = find_verdict(folder)
    assert verdict is not None and verdict.rank == 1
    assert "rank 0 on n0 waits in all_reduce of group default_pg since step 7 for rank 1 on n1" in verdict.sentence


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self._path,)


def test_a_dump_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "dump").write_bytes(pickle.dumps({"entries": [Bomb(tmp_path / "made")]}))
    assert read_dump(tmp_path / "dump") == {} and not (tmp_path / "made").exists()
    (tmp_path / "dump").write_bytes(b"\x00 damaged")
    assert read_dump(tmp_path / "dump") == {}


def test_slurm_says_why_a_job_without_events_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recorded(
        RunFolder(tmp_path / "run"), {"event": "submitted", "cluster": "slurm", "job_id": "7", "nodes": 2}
    )
    folder.attempt(1).mkdir(parents=True)
    monkeypatch.setattr("launch.slurm.status.ask_queue", lambda *_: {})
    monkeypatch.setattr("launch.why.__main__.accounted_state", {"7": "NODE_FAIL"}.__getitem__)
    assert "a node of the job failed (Slurm: NODE_FAIL)" in call(main, folder.path)
    monkeypatch.setattr("launch.slurm.status.ask_queue", lambda *_: {"7": JobState("OUT_OF_MEMORY")})
    assert "the job was killed for its memory (Slurm: OUT_OF_MEMORY)" in call(main, folder.path)
