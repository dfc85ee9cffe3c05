"""Engines: each starts the same ranks, reports the same failure, and ends the ranks at a stop."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest

from launch.agent.engine import FAILED_RANK, NodeRanks, TorchrunEngine
from launch.agent.watch import failure_message
from launch.runs.events import select_events
from launch.runs.folder import RunFolder
from tests.support.commands import is_alive, run, start, wait_for
from tests.support.planning import plan, refused
from tests.support.runs import LOCAL, write_script

HAS_NVRX = importlib.util.find_spec("nvidia_resiliency_ext") is not None
ENGINES = [
    "fork:torch+own",
    "exec",
    "torchrun",
    pytest.param("nvrx", marks=pytest.mark.skipif(not HAS_NVRX, reason="needs nvidia-resiliency-ext")),
    "own.Renamed",
]
OWN = """
from dataclasses import replace

from launch.agent.engine import NodeRanks, ProcessEngine


class Renamed(ProcessEngine):
    def __init__(self, ranks: NodeRanks) -> None:
        super().__init__(replace(ranks, args=["env", "BY=me", *ranks.args]))
"""
SUM = """
import json, os, sys
is_early = "own" in sys.modules
import torch, torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
known = {key: os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "WANDB_RUN_ID")}
print(json.dumps({**known, "sum": total.item(), "by": os.environ.get("BY"), "early": is_early}), flush=True)
if "fail" in sys.argv and dist.get_rank() == 3:
    raise KeyError("lost sheep")
dist.barrier()
dist.destroy_process_group()
"""
OUTLAST = """
import os, pathlib, signal, sys, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready = pathlib.Path(sys.argv[1])
if os.environ["RANK"] == "0":
    while not ready.exists():
        time.sleep(0.1)
    raise KeyError("lost sheep")
ready.touch()
time.sleep(1000)
"""
WAIT = """
import os, time
from launch import worker

worker.attach()
print(os.getpid(), flush=True)
time.sleep(1000)
"""
SLEEP = """
import os, subprocess, time

print(os.getpid(), subprocess.Popen(["sleep", "1000"]).pid, flush=True)
time.sleep(1000)
"""


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(request.param)


def words(engine: str, folder: RunFolder, *more: str) -> list[str]:
    return [*LOCAL, "ranks_per_node=2", f"resilience.engine={engine}", f"run_dir={folder.path}", *more]


def test_each_engine_starts_the_ranks_of_all_nodes(engine: str, tmp_path: Path) -> None:
    folder, script = RunFolder(tmp_path / "run"), write_script(tmp_path, SUM)
    run("launch", *words(engine, folder, "nodes=2", f"script.path={script}", "script.args=--run"), cwd=tmp_path)
    printed = [json.loads(folder.log(1, rank).read_text()) for rank in range(4)]
    assert [entry["sum"] for entry in printed] == [4.0] * 4
    places = [(entry["RANK"], entry["LOCAL_RANK"], entry["GROUP_RANK"]) for entry in printed]
    assert places == [("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1")]
    assert len({entry["WANDB_RUN_ID"] for entry in printed}) == 4
    assert {entry["by"] for entry in printed} == {"me" if engine.startswith("own") else None}
    assert {entry["early"] for entry in printed} == {engine.startswith("fork:")}


def test_each_engine_names_the_rank_that_failed_first(engine: str, tmp_path: Path) -> None:
    folder, script = RunFolder(tmp_path / "run"), write_script(tmp_path, SUM)
    failing = words(engine, folder, "nodes=2", f"script.path={script}", "script.args=fail")
    printed = run("launch", *failing, cwd=tmp_path, status=1)
    (verdict,) = select_events(folder.read_events(), "verdict")
    assert "rank 3" in verdict["cause"] and "lost sheep" in verdict["cause"], verdict
    assert "lost sheep" in printed


def test_each_engine_kills_a_rank_that_outlasts_another_ranks_failure(engine: str, tmp_path: Path) -> None:
    folder, script = RunFolder(tmp_path / "run"), write_script(tmp_path, OUTLAST)
    failing = words(engine, folder, "nodes=1", f"script.path={script}", f"script.args={tmp_path / 'ready'}")
    run("launch", *failing, cwd=tmp_path, status=1)
    (failed,) = select_events(folder.read_events(), "rank_failed")
    assert failed["rank"] == 0 and "lost sheep" in failed["cause"], failed
    printed = "".join(path.read_text() for path in folder.log(1, 0).parent.glob("engine_*.log"))
    assert "forcefully exiting" not in printed  # torchrun's own SIGKILL, after 30 s


def test_each_engine_ends_its_ranks_and_their_children_at_a_stop(engine: str, tmp_path: Path) -> None:
    script = write_script(tmp_path, SLEEP)
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    process = start("launch", *words(engine, folder, "nodes=1", f"script.path={script}"), cwd=tmp_path, log=log)
    logs = [folder.log(1, rank) for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text().endswith("\n") for path in logs), "both ranks")
    pids = [int(word) for path in logs for word in path.read_text().split()]
    process.terminate()
    wait_for(lambda: select_events(folder.read_events(), "stopped"), "the end of the run")
    wait_for(lambda: not any(map(is_alive, pids)), "the end of all processes")


def test_the_ranks_of_each_engine_end_with_their_agent(engine: str, tmp_path: Path) -> None:
    folder, script = RunFolder(tmp_path / "run"), write_script(tmp_path, WAIT)
    start("launch", *words(engine, folder, "nodes=1", f"script.path={script}"), cwd=tmp_path, log=tmp_path / "log")
    logs = [folder.log(1, rank) for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text().endswith("\n") for path in logs), "both ranks")
    pids = [int(path.read_text()) for path in logs]
    os.kill(select_events(folder.read_events(), "agent_started")[0]["pid"], signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, pids)), "the end of the ranks")


def test_torchrun_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tmp", "logs", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    variables = {0: {"RANK": "0"}}
    engine = TorchrunEngine(NodeRanks(["true"], variables, str(tmp_path), tmp_path / "logs", tmp_path / "scratch"))
    engine.start()
    wait_for(lambda: None not in engine.statuses().values(), "the end of torchrun")
    assert engine.statuses() == {0: 0}
    assert [*(tmp_path / "tmp").iterdir()] == []


def test_an_engine_that_cannot_be_used_is_refused() -> None:
    refused(plan, "resilience.engine=ray", found="resilience.engine=ray", fix="resilience.engine=fork")
    refused(plan, "resilience.engine=json.JSONDecoder", found="which has no method start")
    if not HAS_NVRX:
        refused(plan, "resilience.engine=nvrx", fix="pip install nvidia_resiliency_ext")


def test_an_abort_at_the_exit_does_not_hide_the_exception(tmp_path: Path) -> None:
    stack = 'Traceback (most recent call last):\n[rank3]:   File "a.py", line 2, in <module>'
    end = f"[rank3]: {stack}\n[rank3]: KeyError: 'lost sheep'\n"
    (log := tmp_path / "log").write_text(
        f"{end}terminate called without an active exception\nFatal Python error: Aborted"
    )
    assert failure_message(-signal.SIGABRT, log, {})[0] == "KeyError: 'lost sheep' (then ended by SIGABRT)"
    log.write_text(end)
    assert failure_message(-signal.SIGKILL, log, {})[0] == "KeyError: 'lost sheep' (then ended by SIGKILL)"
    log.write_text(f"{end}and the program went on")
    assert failure_message(-signal.SIGKILL, log, {})[0] == "killed by SIGKILL"


def test_a_failure_is_the_whole_traceback_that_ended_the_program(tmp_path: Path) -> None:
    head, frame = "Traceback (most recent call last):\n", '  File "a.py", line {}, in {}\n'
    frames = "".join(frame.format(number, "<module>" if number == 0 else "f") for number in range(50))
    pool = f"{head}{frames}concurrent.futures.process.BrokenProcessPool: A process ended"
    joint = "\n\nThe above exception was the direct cause of the following exception:\n\n"
    chain = f"{head}{frames}KeyError: 'a'{joint}{pool}"
    (log := tmp_path / "log").write_text(f"step 1\n{chain}\n")
    cause = "concurrent.futures.process.BrokenProcessPool: A process ended (exit status 1)"
    assert failure_message(1, log, {}) == (cause, chain)
    group = f"  + Exception Group {head}  | {frame.format(1, '<module>')}  | ExceptionGroup: two (1 sub-exception)\n"
    group += f"  +-+---------------- 1 ----------------\n    | {head}    | {frame.format(2, 'f')}    | KeyError: 'a'\n"
    log.write_text(f"{group}    +------------------------------------\n")
    assert failure_message(1, log, {})[0] == "ExceptionGroup: two (1 sub-exception) (exit status 1)"
    log.write_text(f"{head}{frame.format(3, 'caught')}KeyError: 'a'\nlicense has run out\n")
    assert failure_message(1, log, {})[0] == "exit status 1"
    for end in ("", "\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.\n"):
        log.write_text(f"{head}{frame.format(3, 'main')}KeyError: 'a'\n{end}")
        assert failure_message(1, log, {})[0] == "KeyError: 'a' (exit status 1)"


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("  rank      : 3 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n", [("1", "", "-9", "7")]),
        ("{1: ProcessFailure(local_rank=1, pid=24645, exitcode=42, error_file='<N/A>'", [("1", "24645", "42", "")]),
        ("failed (exitcode: 1) local_rank: 0 (pid: 24648) of binary: /bin/sh", []),
    ],
    ids=["torchrun", "ft_launcher", "its log"],
)
def test_failed_ranks_are_read_from_what_a_launcher_prints(printed: str, found: list[tuple[str, ...]]) -> None:
    assert FAILED_RANK.findall(printed) == found
