"""The training loop: against a plain one, with evaluations, and with signals."""

from __future__ import annotations

import errno
import fcntl
import gc
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gpt.config import OptimConfig, TrainConfig, compose_train
from gpt.config.optim import DecayShape, LrSchedule
from gpt.parallel import engine as base
from gpt.train import train
from gpt.training.step import lr_at
from launch.runs.compose import to_schema
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.worker import Run as Rank
from tests.support.commands import ROOT, TINY, environment, run
from tests.support.distributed import run_distributed
from tests.support.learning import DEEPSPEED, MODELS, Operations, evaluated, plain_loop, start
from tests.support.learning import step as take_step

STEPS = 90
SAVE_AT, STOP_AT = 60, 80
CUT_S = 177
WORDS = [
    *(f"optim.max_steps={STEPS}", "eval.interval=0", "checkpoint.interval=0"),
    *("model.n_layer=1", "optim.max_micro_batch=8"),
    f"parallel.step_timeout_s={CUT_S}",
]


class Asked(Rank):
    """A rank under torchrun alone, of which one is asked something in the middle of a step."""

    step = 0

    def save_requested(self) -> bool:
        self.step += 1
        return self.rank == 1 and self.step == SAVE_AT

    def stop_requested(self) -> bool:
        return self.rank == 1 and self.step + 1 >= STOP_AT


def no_locks(*args: Any) -> None:
    """Lock a file as Lustre does where it is mounted without ``flock``."""
    raise OSError(errno.ENOSYS, "Function not implemented")


def groups_of(args: Any) -> list[str]:
    """Names of the process groups among the arguments of a collective."""
    return [
        dist.ProcessGroup.unbox(a).group_name for a in args if "ProcessGroup" in str(getattr(a, "_type", lambda: "")())
    ]


def timeout_of(group: Any) -> float:
    """Timeout of the collectives of a group on CPUs, seconds."""
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return timeout.total_seconds()


def watch(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Train until it is stopped, on a filesystem without locks; collections and messages between processes by step."""
    with mock.patch.object(base, "get_state_dict", wraps=base.get_state_dict) as states:
        run = start(rank, size, folder, *WORDS)
    run.worker = Asked(rank, rank, size)
    run.worker.open_folder(run.folder.path, run.attempt)
    collected: list[tuple[int, int]] = []
    messages: list[int] = []
    control = run.world.control.group_name

    def on_collection(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append((run.step, info["generation"]))

    def is_message(name: str, args: Any, kwargs: Any) -> bool:
        if name.startswith("c10d.") and control in groups_of(args):
            messages.append(run.step)
        return False

    gc.callbacks.append(on_collection)
    try:
        with mock.patch.object(fcntl, "lockf", no_locks), Operations(is_message):
            outcome = train(run)
    finally:
        gc.callbacks.remove(on_collection)
    run.world.gather(None)  # rank 0 writes the event log last of all
    return {
        "outcome": outcome,
        "timeouts": [timeout_of(group) for group in (dist.group.WORLD, run.world.control)],
        "states": states.call_count,
        "collected": collected,
        "messages": messages,
        "step": run.step,
        "enabled": gc.isenabled(),
        "saved": run.checkpoints.steps(),
        "recorded": [record["step"] for record in read_records(run.folder.metrics(rank))],
        "events": [event["event"] for event in run.folder.read_events()],
    }


def test_ranks_collect_garbage_together_exchange_nothing_and_obey_what_one_of_them_is_asked(tmp_path: Path) -> None:
    for found in run_distributed(watch, 2, tmp_path / "run"):
        assert found["states"] == 0, "a run that begins makes no state to load into"
        of_training, of_control = found["timeouts"]
        assert of_training == CUT_S < of_control, "cut once steps were made"
        assert [entry for entry in found["collected"] if 0 < entry[0] < SAVE_AT] == [(50, 1)]
        assert (0, 2) in found["collected"], "what was left from building, all of it, once"
        assert found["enabled"], "given back to Python"
        assert found["messages"] and min(found["messages"]) >= SAVE_AT, "those of saving alone are seen"
        assert found["outcome"] == "stopped" and STOP_AT <= found["step"] <= STOP_AT + 2
        assert found["saved"] == [SAVE_AT + 1, found["step"]]
        assert found["recorded"] == list(range(1, found["step"] + 1))
        assert found["events"][-1] == "stopped" and found["events"].count("saved") == 2


# A signal that comes while a process ends, after all was saved, does not make a failure of it.


ENDING = """
import os, signal
from launch.worker import Run

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.Signals({number})):
        kill(pid, number)  # by now Python has given the signals their default back

run = Run()
run.install_handlers()
kept = Last()
{close}
"""


@pytest.mark.parametrize(("number", "close", "status"), [(signal.SIGTERM, "run.close()", 0), (signal.SIGUSR2, "", -1)])
def test_the_end_of_a_process_cannot_be_interrupted(number: signal.Signals, close: str, status: int) -> None:
    script = ENDING.format(number=number.value, close=close)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), timeout=60, check=False)
    assert done.returncode == status * number.value


# Evaluations beside the steps of a run: they leave nothing behind, under any engine.


ENGINES = {
    "ddp": [],
    "zero1": [],
    "fsdp": MODELS["untied, grouped queries"],
    "fsdp parallel.cpu_offload=true": MODELS["tied"],
    "tp parallel.tp=2": [],
    "ep parallel.ep=2 parallel.strategy=fsdp": MODELS["experts"],
    "cp parallel.cp=2 parallel.strategy=fsdp": [],
    "pp parallel.pp=2": MODELS["tied"],
    "pp parallel.pp=2 parallel.strategy=fsdp": [],
    "ds_zero0": [],
    "zero2": [],
    "zero3": [],
    "ds_pp_zero1": [],
}


def learn(rank: int, size: int, folder: Path, engines: list[str]) -> dict[str, list[list[tuple[float, float]]]]:
    """Loss and gradient norm of two steps, by themselves, and with an evaluation after each of them."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for number, engine in enumerate(engines):
        found[engine] = []
        for evaluates in (False, True):
            words = [*f"parallel={engine}".split(), "optim.max_micro_batch=4", *ENGINES[engine]]
            run = start(rank, size, folder / f"{number}-{evaluates}", *words)
            found[engine].append([])
            held = [*run.engine.module.parameters()]
            for _ in range(2):
                found[engine][-1].append(take_step(run))
                if evaluates:
                    evaluated(run)
                    now = run.engine.module.parameters()
                    assert all(a is b for a, b in zip(held, now, strict=True)), f"{engine}: nothing stays gathered"
    return found


def test_an_evaluation_changes_no_step_after_it_under_any_engine(tmp_path: Path) -> None:
    for told in run_distributed(learn, 2, tmp_path / "runs", list(ENGINES), timeout_s=500, imports=DEEPSPEED):
        for engine, (alone, evaluated_too) in told.items():
            assert alone == evaluated_too, engine


# The training loop against a plain one: no engines, no micro-batches, torch's own clipping and schedulers.


STEPS_OF_REFERENCE = 6
WORDS_OF_REFERENCE = [
    *TINY,
    f"optim.max_steps={STEPS_OF_REFERENCE}",
    "eval.interval=0",
    "optim.warmup_steps=3",
    "optim.lr=3e-3",
    "optim.min_lr=3e-4",
    "optim.grad_clip=0.5",
]


def test_losses_and_gradient_norms_are_those_of_a_plain_loop_and_bf16_is_close(tmp_path: Path) -> None:
    given = [word for word in WORDS_OF_REFERENCE if not word.startswith("optim.max_steps")]
    tokens = to_schema(compose_train(given), TrainConfig)
    a_step = tokens.optim.global_batch * tokens.model.block_size
    budget = f"optim.max_tokens={(STEPS_OF_REFERENCE - 0.5) * a_step:g}"
    records = {}
    for precision, words in (("fp32", WORDS_OF_REFERENCE), ("bf16", [*given, budget])):
        folder = tmp_path / precision
        run("gpt.train", *words, f"precision={precision}", f"run_dir={folder}", cwd=tmp_path)
        records[precision] = read_records(RunFolder(folder).metrics(0))
        assert [r["step"] for r in records[precision]] == [*range(1, STEPS_OF_REFERENCE + 1)]
        assert records[precision][-1]["lr"] == pytest.approx(3e-4), "the cosine has come to its end"
    config = to_schema(compose_train(WORDS_OF_REFERENCE), TrainConfig)
    reference = plain_loop(config, tmp_path, STEPS_OF_REFERENCE, micro=config.optim.global_batch)
    losses, losses_bf16 = ([r["loss"] for r in records[precision]] for precision in ("fp32", "bf16"))
    assert losses == pytest.approx(reference["losses"], rel=1e-5)
    assert [r["grad_norm"] for r in records["fp32"]] == pytest.approx(reference["norms"], rel=1e-4)
    assert losses_bf16 == pytest.approx(losses, rel=2e-2) and losses_bf16 != losses


def test_the_schedule_is_torchs_warm_up_and_cosine() -> None:
    config = OptimConfig(max_steps=50, lr=1e-3, min_lr=1e-4, warmup_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=1e-4)
    expected = []
    for step in range(1, 51):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        (warm_up if step < 10 else cosine).step()
    assert [lr_at(config, step) for step in range(1, 51)] == pytest.approx([*expected[:10], *expected[10:]], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"schedule": LrSchedule.linear}, [0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        ({"schedule": LrSchedule.constant}, [0.5, *[1.0] * 9]),
        ({"schedule": LrSchedule.wsd}, [0.5, *[1.0] * 8, 0.2]),
        ({"schedule": LrSchedule.wsd, "decay_from": 6}, [0.5, *[1.0] * 5, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": LrSchedule.wsd, "decay_from": 0.6}, [0.5, *[1.0] * 5, 0.8, 0.6, 0.4, 0.2]),
        (
            {"schedule": LrSchedule.wsd, "decay_from": 6, "decay_shape": DecayShape.sqrt},
            [0.5, *[1.0] * 5, 0.6, 0.434315, 0.307180, 0.2],  # 0.2 + 0.8 (1 - sqrt(1/4)), of 2/4, of 3/4
        ),
        (
            {"schedule": LrSchedule.wsd, "decay_from": 6, "decay_shape": DecayShape.cosine},
            [0.5, *[1.0] * 5, 0.882843, 0.6, 0.317157, 0.2],
        ),
    ],
)
def test_schedules_are_those_worked_out_by_hand(words: dict[str, Any], expected: list[float]) -> None:
    config = OptimConfig(max_steps=10, lr=1.0, min_lr=0.2, warmup_steps=2, **words)
    assert [lr_at(config, step) for step in range(1, 11)] == pytest.approx(expected, abs=1e-6)
