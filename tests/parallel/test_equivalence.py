"""However a model is shared among data ranks, it learns the same: against one process that takes one pass a step."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from gpt.resume import save
from tests.distributed import run_distributed
from tests.parallel.learning import ACCUMULATIONS, BATCH, MODELS, assert_same, learn, learn_alone, start, step

STRATEGIES = {
    "ddp": ["parallel=ddp"],
    "zero1": ["parallel=zero1"],
    "fsdp": ["parallel=fsdp"],
    "hsdp": ["parallel=hsdp", "parallel.dp_shard=2"],
}
CASES = [(strategy, model) for strategy in STRATEGIES for model in MODELS]


def learn_all(rank: int, size: int, folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    found = {}
    for (strategy, model), accumulation in itertools.product(CASES, ACCUMULATIONS):
        micro = BATCH // (size * accumulation)
        words = [*STRATEGIES[strategy], *MODELS[model], f"optim.micro_batch={micro}"]
        run = start(rank, size, folder / f"{strategy}{model}{accumulation}", *words)
        assert run.batch.accumulation == accumulation
        found[strategy, model, accumulation] = learn(run)
    return found if rank == 0 else {}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_distributed(learn_alone, 1, tmp_path_factory.mktemp("alone") / "runs", MODELS)[0]


@pytest.fixture(scope="module", params=[2, 4])
def spread(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"on_{request.param}") / "runs"
    return run_distributed(learn_all, request.param, folder, timeout_s=400)[0]


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize(("strategy", "model"), CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(
    strategy: str,
    model: str,
    accumulation: int,
    spread: dict[tuple[str, str, int], dict[str, Any]],
    reference: dict[str, dict[str, Any]],
) -> None:
    assert_same(spread[strategy, model, accumulation], reference[model])


CROSSED = ("ddp", "zero1", "fsdp", "hsdp")


def cross(rank: int, size: int, folder: Path) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Save under each strategy, go on under each: the losses of the steps after, and those that were to come."""
    found = {}
    words = [*MODELS["untied, grouped queries"], "optim.micro_batch=2"]
    for saved in CROSSED:
        there = folder / saved
        run = start(rank, size, there, *STRATEGIES[saved], *words)
        for _ in range(2):
            step(run)
        save(run, lambda: True)
        to_come = [step(run)[0] for _ in range(3)]
        for resumed in CROSSED:
            again = start(rank, size, there, *STRATEGIES[resumed], *words)
            assert again.step == 2
            found[saved, resumed] = ([step(again)[0] for _ in range(3)], to_come)
    return found


def test_a_checkpoint_of_each_strategy_goes_on_under_each_other(tmp_path: Path) -> None:
    found = run_distributed(cross, 4, tmp_path / "runs", timeout_s=300)[0]
    assert len(found) == len(CROSSED) ** 2
    for pair, (losses, to_come) in found.items():
        assert losses == pytest.approx(to_come, rel=1e-6), pair
        if pair[0] == pair[1]:
            assert losses == to_come, f"{pair[0]}: bit for bit"
