"""Rows of benchmarks/scale/growth.py about step records and the reports from them.

Each function measures one row and returns the finding in words, and whether it meets the demand.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from launch.runs import records
from launch.runs.folder import RunFolder, append_whole, write_json
from launch.runs.records import read_records
from launch.worker import Run
from tests.support.commands import ROOT, TINY, environment

STEPS = 1000
RECORDED_S = 23.5
"""Time in seconds from the first record until the rank is killed. This is just before its writer thread writes again,
so that most records are lost. The writer of a rank above 0 waits a quarter second before its first write; each further
wait is twice as long as the one before, up to 8 s."""
HANG_S = 5.0
BASE_S, SLOW_S = 0.5, 0.03
SEQUENCES, TOKENS, PER_NODE = 8, 2048, 8


def train_command(folder: Path, *words: str) -> list[str]:
    """Return the arguments of ``gpt.train`` for a run of a tiny GPT on one rank."""
    tiny = [*TINY, "model.n_layer=1", "model.n_embd=16", "model.block_size=16", "optim.max_micro_batch=8"]
    quiet = ["eval.interval=0", "checkpoint.interval=0", "logging.tensorboard=false", "device=cpu"]
    return [*tiny, *quiet, f"run_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}", *words]


def system_calls() -> tuple[str, bool]:
    """Return row A6: how often ``gpt.train`` opens, locks and writes the file of its step records. strace counts the
    calls.
    """
    with tempfile.TemporaryDirectory() as name:
        words = train_command(Path(name), f"optim.max_steps={STEPS}")
        trace = ["strace", "-f", "-y", "-qq", "-e", "trace=openat,fcntl,write,pwrite64,writev", "-o", f"{name}/trace"]
        command = [*trace, sys.executable, "-m", "gpt.train", *words]
        subprocess.run(command, cwd=name, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, check=True)
        calls = [line for line in Path(name, "trace").read_text().splitlines() if "rank_00000.jsonl" in line]
        recorded = len(read_records(RunFolder(Path(name) / "run").metrics(0)))
    opens = sum("openat(" in line and "O_APPEND" in line for line in calls)
    locks = sum("F_SETLK" in line or "F_OFD" in line for line in calls)
    writes = sum(re.search(r"\b(write|pwrite64|writev)\(", line) is not None for line in calls)
    whole = recorded == STEPS
    return f"{opens}, {locks}, {writes}", (opens, locks) == (1, 0) and writes <= STEPS / 10 and whole


RECORDING = """
import sys, time
from pathlib import Path
from launch.worker import Run
run = Run(rank=1, world_size=2)
run.open_folder(Path(sys.argv[1]), 1)
step = 0
while True:
    step += 1
    run.record(step, loss=1.0)
    print(time.time(), flush=True)
    time.sleep(0.05)
"""


def lost_by_a_kill() -> tuple[str, bool]:
    """Return row "A6 killed": the seconds of records that a kill loses, for a rank that records 20 steps a second.

    The second value is True if these are at most 10 s.
    """
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log"
        with log.open("w") as out:
            env = environment(PYTHONPATH=str(ROOT))
            process = subprocess.Popen([sys.executable, "-c", RECORDING, f"{name}/run"], stdout=out, env=env)
            while not log.stat().st_size and process.poll() is None:
                time.sleep(0.01)
            time.sleep(RECORDED_S)
            process.kill()
            process.wait()
        last = float(log.read_text().splitlines()[-1])
        lost = last - read_records(RunFolder(Path(name) / "run").metrics(1))[-1]["time"]
    return f"{lost:.1f}", lost <= 10


WITHOUT_LOCKS = """
import errno, fcntl, sys
def refuse(*args):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.lockf = refuse
from gpt.train import main
sys.exit(main(sys.argv[1:]))
"""


def no_locks() -> tuple[str, bool]:
    """Return row "A6 locks": whether a short run with a checkpoint finishes where ``lockf`` fails."""
    with tempfile.TemporaryDirectory() as name:
        words = train_command(Path(name), "optim.max_steps=3", "optim.warmup_steps=1")
        command = [sys.executable, "-c", WITHOUT_LOCKS, *words]
        ended = subprocess.run(command, cwd=name, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
        events = [e["event"] for e in RunFolder(Path(name) / "run").read_events()]
        recorded = len(read_records(RunFolder(Path(name) / "run").metrics(0)))
    finished = ended.returncode == 0 and events[-1:] == ["finished"] and recorded == 3
    return "finishes" if finished else f"status {ended.returncode}, events {', '.join(events)}", finished


def hung_filesystem() -> tuple[str, bool]:
    """Return row "A6 hung": the time of each call that records a step while the write of the writer thread hangs."""

    def hang(descriptor: int, data: bytes) -> None:
        time.sleep(HANG_S)
        append_whole(descriptor, data)

    with tempfile.TemporaryDirectory() as name, mock.patch.object(records, "append_whole", hang):
        run = Run()
        run.open_folder(Path(name) / "run", 1)
        taken = []
        for step in range(1, STEPS + 1):
            began = time.perf_counter()
            run.record(step, loss=1.0, tokens=2048, samples=(0, 7))
            taken.append(time.perf_counter() - began)
            time.sleep(0.002)
        run.flush()
        whole = len(read_records(RunFolder(Path(name) / "run").metrics(0))) == STEPS
    slow, total = sorted(taken)[-len(taken) // 100], sum(taken)
    text = f"{slow * 1e3:.2f} ms; {total:.2f} s (the longest {max(taken) * 1e3:.1f} ms)"
    return text, slow <= 1e-3 and total < HANG_S and whole


def write_run(folder: Path, ranks: int, steps: int, slow_rank: int = -1) -> None:
    """Write the folder of a synthetic run in which all ranks write complete step records.

    A step takes 0.5 s + 1 ms * (step mod 7) + 0.1 ms * (rank mod 5), and 30 ms more on ``slow_rank``; -1: no rank is
    slow.
    """
    run, began = RunFolder(folder), 1.7e9
    batch = ranks * SEQUENCES
    (folder / "metrics").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(f"- nodes={-(-ranks // PER_NODE)}\n- parallel=fsdp\n")
    places = [
        {
            **{"rank": rank, "local_rank": rank % PER_NODE, "node": rank // PER_NODE, "host": host_of(rank)},
            **{"machine": host_of(rank), "pid": 1000 + rank, "device": f"cuda:{rank % PER_NODE}", "cores": 96},
            **{"device_name": "NVIDIA H100 80GB HBM3", "device_uuid": f"GPU-{rank:08d}", "threads": 1},
        }
        for rank in range(ranks)
    ]
    topology = {"strategy": "fsdp", "dp_replicate": 1, "dp_shard": ranks, "pp": 1, "cp": 1, "tp": 1, "ep": 1}
    described = {
        **{"attempt": 1, "time": began, "world_size": ranks, "topology": topology, "global_batch": batch},
        **{"micro_batch": 4, "accumulation": 2, "weak_scaling": False, "block_size": TOKENS, "precision": "bf16"},
        **{"model": "synthetic", "parameters": 1_364_297_728, "max_steps": steps, "ranks": places},
        **{"software": {"torch": "2.13.0"}, "git": {"commit": "0" * 10, "diff_sha256": ""}},
    }
    write_json(run.environment(1), described)
    write_json(folder / "plan.json", {"point": folder.name, "run_dir": str(folder), "world_size": ranks})
    layers = [*(f"blocks.{i}" for i in range(24)), "token_embedding", "norm", "head"]
    gradients = json.dumps({name: 0.0312345678901234 + i * 1e-3 for i, name in enumerate(layers)})
    now, parts = began, []
    for step in range(1, steps + 1):
        seconds = BASE_S + 1e-3 * (step % 7)
        now += seconds
        measured = f', "grad_mean": 1.5e-09, "grad_std": 3.1e-05, "layer_grad_norms": {gradients}'
        head = f'{{"step": {step}, "attempt": 1, "loss": {10 / (1 + step / 100)!r}, "lr": 0.0003, "grad_norm": 0.5123'
        tail = f'{"" if step % 10 else measured}, "tokens_per_s": {batch * TOKENS / seconds!r}, "tflops_per_s": 405.12'
        tail += ', "mfu_palm": 0.41, "mfu_causal": 0.38, "hfu": 0.41, "memory_peak_gib": 61.12, "time": '
        parts.append((head, seconds, tail, now))
    for rank in range(ranks):
        extra = 1e-4 * (rank % 5) + (SLOW_S if rank == slow_rank else 0)
        lines = []
        for number, (head, seconds, tail, ended) in enumerate(parts):
            first = number * batch + rank * SEQUENCES
            own = f', "tokens": {SEQUENCES * TOKENS}, "samples": [{first}, {first + SEQUENCES - 1}]'
            times = f', "step_time_s": {seconds + extra!r}, "data_wait_s": 0.001234567'
            lines.append(f"{head}{own}{times}{tail}{ended + extra!r}}}\n")
        run.metrics(rank).write_text("".join(lines))
    for event, at in (("started", began - 1), ("finished", now + 1), ("attempt_ended", now + 2)):
        run.record_event(event, attempt=1, step=0 if event == "started" else steps, cause="finished", time=at)


def host_of(rank: int) -> str:
    """Return the host name of a rank."""
    return f"gpu{rank // PER_NODE:04d}"


USED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=file)
sys.exit(code)
"""
"""Program that runs a command and writes its CPU seconds and peak memory. It is a small process of its own, because
Linux counts the memory of the starting process as memory of the command until the command replaces it.
"""


def report(folder: Path) -> tuple[str, float, float]:
    """Return the output of `python -m launch.report` on a run folder, its CPU seconds, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as name:
        env = environment(PYTHONPATH=str(ROOT), COLUMNS="250")
        command = [sys.executable, "-c", USED, f"{name}/used", sys.executable, "-m", "launch.report", str(folder)]
        ended = subprocess.run(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if ended.returncode:
            raise RuntimeError(ended.stdout.strip().splitlines()[-1])
        seconds, peak_kib = map(float, Path(name, "used").read_text().split())
    written = "\n".join(path.read_text() for path in sorted(folder.rglob("*.md")))
    return f"{ended.stdout}\n{written}", seconds, peak_kib * 1024 / 1e6


def report_of_many() -> tuple[str, bool]:
    """Return row A7: the CPU time and the memory of a report on 1,024 ranks with 2,000 steps each, also relative to 64
    ranks.
    """
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        for ranks in (64, 1024):
            folder = Path(name) / f"nodes={ranks // PER_NODE}"
            write_run(folder, ranks, 2000)
            text, seconds, peaks[ranks] = report(folder)
    right = "503.4" in text or "503 ms" in text
    found = f"{seconds:.1f} s; {peaks[1024]:,.0f} MB, {peaks[1024] / peaks[64]:.2f} x; "
    found += "503.4 ms" if right else "another step time"
    return found, seconds <= 4 and peaks[1024] <= 200 and peaks[1024] <= 1.2 * peaks[64] and right


def slow_rank() -> tuple[str, bool]:
    """Return row A8: which facts about the slow rank a report on 256 ranks names. The facts are its number, its host,
    its delay, and the share of the delay in a step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "nodes=32"
        write_run(folder, 256, 300, slow_rank=17)
        text, _, _ = report(folder)
    looked = {
        "rank 17": r"rank 17\b",
        host_of(17): host_of(17),
        "30 ms": r"\b(30|29\.\d|30\.\d)\d* ms",
        "5.6 %": r"5\.[67]",
    }
    named = [words for words, pattern in looked.items() if re.search(pattern, text)]
    return ", ".join(named) or "nothing", len(named) == len(looked)
