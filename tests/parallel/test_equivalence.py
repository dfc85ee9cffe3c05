"""Every data-parallel strategy learns the same: against one process with one micro-batch a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpt.training.checkpoints import save
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, Case, assert_all_same, learn_alone, learn_cases, start, step

STRATEGIES = {
    "ddp": "parallel=ddp",
    "zero1": "parallel=zero1",
    "fsdp": "parallel=fsdp",
    "hsdp": "parallel=hsdp parallel.dp_shard=2",
}
PASSES = dict(zip(MODELS, (1, 4, 4), strict=True))
EACH = "parallel.reduce_each_micro_batch=true"
CASES = {
    2: [
        Case(words, model, 5 - PASSES[model])
        for name, words in STRATEGIES.items()
        if name != "hsdp"
        for model in MODELS
    ],
    4: [
        *(Case(STRATEGIES["hsdp"], model, PASSES[model]) for model in ("tied", "experts")),
        Case(f"{STRATEGIES['hsdp']} {EACH}", "untied, grouped queries", 4),
        Case(f"{STRATEGIES['fsdp']} {EACH}", "tied", 4),
        # Both blocks in one unit, which a recomputed block must not take for its own.
        Case(f"{STRATEGIES['fsdp']} parallel.fsdp_min_num_params=1000000 recompute=full", "untied, grouped queries", 4),
        Case(STRATEGIES["ddp"], "tied", PASSES["tied"]),
        Case(STRATEGIES["zero1"], "untied, grouped queries", PASSES["untied, grouped queries"]),
    ],
}
"""Every strategy and model; one micro-batch a step on two ranks is four on four ranks, and vice versa."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_distributed(learn_alone, 1, tmp_path_factory.mktemp("alone") / "runs", MODELS)[0]


@pytest.mark.parametrize("ranks", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(
    ranks: int, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    found = run_distributed(learn_cases, ranks, tmp_path / "spread" / "runs", CASES[ranks], MODELS, timeout_s=400)[0]
    assert_all_same(CASES[ranks], found, alone)


CROSSED = {"ddp": "fsdp", "fsdp": "zero1", "zero1": "hsdp", "hsdp": "ddp"}
"""Each strategy, and the other one under which its checkpoint goes on: a ring, so that each is saved and resumed."""
EXACT = ("zero1", "hsdp")
"""Go on under themselves too, bit for bit; as ddp and fsdp do after ``kill -9`` (tests/training/test_resume.py)."""
BIASED = (*MODELS["experts"], "model.expert_balance=bias", "model.balance_bias_rate=0.05")
"""Its biases are buffers: no gradient moves them, and a checkpoint holds them."""


def cross(rank: int, size: int, folder: Path) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Save under each strategy, go on under another, some under the same: the losses after that, and those to come."""
    found = {}
    words = [*MODELS["untied, grouped queries"], *BIASED, "model.n_layer=1", "optim.max_micro_batch=4"]
    for saved, other in CROSSED.items():
        there = folder / saved
        run = start(rank, size, there, *STRATEGIES[saved].split(), *words)
        step(run)
        save(run)
        to_come = [step(run)[0] for _ in range(2)]
        for resumed in (saved, other) if saved in EXACT else (other,):
            again = start(rank, size, there, *STRATEGIES[resumed].split(), *words)
            assert again.step == 1
            found[saved, resumed] = ([step(again)[0] for _ in range(2)], to_come)
    return found


def test_a_checkpoint_of_each_strategy_goes_on_under_another(tmp_path: Path) -> None:
    found = run_distributed(cross, 4, tmp_path / "runs", timeout_s=300)[0]
    assert found.keys() == {*CROSSED.items(), *((name, name) for name in EXACT)}
    for pair, (losses, to_come) in found.items():
        assert losses == pytest.approx(to_come, rel=1e-6), pair
        if pair[0] == pair[1]:
            assert losses == to_come, f"{pair[0]}: bit for bit"
