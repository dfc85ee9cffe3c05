"""Evaluations beside the steps of a run: they leave nothing behind, under any engine."""

from __future__ import annotations

from pathlib import Path

from tests.support.distributed import run_distributed
from tests.support.learning import DEEPSPEED, MODELS, evaluated, start, step

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
    """Loss and gradient norm of three steps, by themselves, and with an evaluation after each of them."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for number, engine in enumerate(engines):
        found[engine] = []
        for evaluates in (False, True):
            words = [*f"parallel={engine}".split(), "optim.max_micro_batch=4", *ENGINES[engine]]
            run = start(rank, size, folder / f"{number}-{evaluates}", *words)
            found[engine].append([])
            held = [*run.engine.module.parameters()]
            for _ in range(3):
                found[engine][-1].append(step(run))
                if evaluates:
                    evaluated(run)
                    now = run.engine.module.parameters()
                    assert all(a is b for a, b in zip(held, now, strict=True)), f"{engine}: nothing stays gathered"
    return found


def test_an_evaluation_changes_no_step_after_it_under_any_engine(tmp_path: Path) -> None:
    for told in run_distributed(learn, 2, tmp_path / "runs", list(ENGINES), timeout_s=500, imports=DEEPSPEED):
        for engine, (alone, evaluated_too) in told.items():
            assert alone == evaluated_too, engine
