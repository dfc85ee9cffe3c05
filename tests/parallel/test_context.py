"""Ranks that share sequences learn what one process learns, whichever way they see each other's tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gpt.config import TrainConfig
from gpt.parallel.context import SequenceShard
from gpt.topology.check_dims import check_parallel_dims
from gpt.training.checkpoints import save
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, TINY, Case, assert_all_same, evaluated, learn_alone, learn_cases, start, step

METHODS = ("allgather", "ring")
ONE = "model.n_layer=1"
"""Enough for a kind of layer; layers that follow each other are in ``MODELS``."""
ROUTING = ["model.balance_coefficient=0.3", "model.z_coefficient=0.1"]
OTHERS = {
    "one key-value head, written out": ["model.n_kv_head=1", "model.attention=manual", "model.position=none", ONE],
    "normalized queries": ["model.qk_norm=true", "model.attention=flash", "model.rope_scaling=ntk", ONE],
    "losses of routing": [*MODELS["experts"], *ROUTING, ONE],
}
STAGED = "losses of routing in two stages"
ALL = {name: words for name, words in MODELS.items() if name != "experts"} | OTHERS
WITH_STAGES = ALL | {STAGED: [*MODELS["experts"], *ROUTING]}
RING = " parallel.cp_method=ring"
GQA = "untied, grouped queries"
ROUTED = "losses of routing"
CASES = {
    2: [
        *(Case("parallel=cp", model) for model in ALL),
        *(Case(f"parallel=cp{RING}", model) for model in ALL if model not in ("tied", ROUTED)),
        *(Case(f"parallel=fsdp_cp{method}", GQA, 1) for method in ("", RING)),
    ],
    4: [
        *(Case(f"parallel=cp parallel.cp=4{method}", model) for model, method in ((GQA, RING), (ROUTED, ""))),
        Case("parallel=cp", "tied", 1),
        Case(f"parallel=fsdp_cp{RING}", GQA),
        Case("parallel=fsdp_cp parallel.dp_shard=1", GQA),
        Case("parallel=cp parallel.ep=2", ROUTED),
        Case("parallel=fsdp_cp parallel.ep=2", ROUTED),
        Case(f"parallel=tp parallel.cp=2{RING}", "tied"),
        Case("parallel=fsdp_tp parallel.cp=2", ROUTED),
        Case(f"parallel=pp parallel.cp=2{RING}", "tied"),
        Case("parallel=pp_fsdp parallel.cp=2", STAGED),
    ],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_distributed(learn_alone, 1, tmp_path_factory.mktemp("alone") / "runs", WITH_STAGES)[0]


@pytest.mark.parametrize("ranks", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(
    ranks: int, reference: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    found = run_distributed(learn_cases, ranks, tmp_path / "runs", CASES[ranks], WITH_STAGES, timeout_s=400)[0]
    assert_all_same(CASES[ranks], found, reference)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_is_taken_once_and_every_rank_has_the_same_work(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, work = [], []
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        positions_T = SequenceShard(None).part(torch.arange(48))
        tokens += positions_T.tolist()
        work.append(int((positions_T + 1).sum()))  # a token looks at those before it and at itself
    assert sorted(tokens) == list(range(48))
    assert len(set(work)) == 1


def go_on(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Evaluation, recomputation and checkpoints of runs that share sequences, and of one that does not."""
    words = [*MODELS["untied, grouped queries"], "optim.max_micro_batch=8"]
    kinds = {
        "alone": ["parallel=ddp"],
        "allgather": ["parallel=cp"],
        "ring": ["parallel=fsdp_cp", "parallel.cp_method=ring"],
    }
    resumed_as = {"alone": ["ring"], "allgather": ["allgather", "alone"], "ring": ["ring", "allgather"]}
    found: dict[str, Any] = {"crossed": {}, "recomputed": {}, "evaluated": {}}
    for saved, kind in kinds.items():
        there = folder / saved
        run = start(rank, size, there, *kind, *words)
        found["evaluated"][saved] = evaluated(run)
        steps = [step(run) for _ in range(2)]
        save(run)
        to_come = [step(run) for _ in range(2)]
        for resumed in resumed_as[saved]:
            again = start(rank, size, there, *kinds[resumed], *words)
            assert again.step == 2
            found["crossed"][saved, resumed] = ([step(again) for _ in range(2)], to_come)
        for recompute in ("selective", "full") if saved != "alone" else ():
            again = start(rank, size, folder / f"{saved}{recompute}", *kind, *words, f"recompute={recompute}")
            found["recomputed"][saved, recompute] = ([step(again) for _ in range(2)], steps)
    return found


def test_evaluation_recomputation_and_checkpoints_are_those_of_a_run_that_shares_no_sequences(tmp_path: Path) -> None:
    found = run_distributed(go_on, 2, tmp_path / "runs", timeout_s=200)[0]
    alone = found["evaluated"].pop("alone")
    assert found["evaluated"] == pytest.approx(dict.fromkeys(found["evaluated"], alone), rel=1e-6)
    for pair, (losses, to_come) in found["crossed"].items():
        assert losses == [pytest.approx(expected, rel=1e-5) for expected in to_come], pair
        if pair[0] == pair[1]:
            assert losses == to_come, f"{pair[0]}: bit for bit"
    assert len(found["recomputed"]) == 4
    for case, (losses, kept) in found["recomputed"].items():
        assert losses == kept, f"{case}: bit for bit"


def kept_bytes(rank: int, size: int, folder: Path) -> dict[str, int]:
    """Bytes that the forward pass over one sequence keeps for the backward pass, parameters not counted."""
    found = {}
    words = ["model.block_size=128", "optim.max_micro_batch=1", "model.n_kv_head=2"]
    for method in METHODS:
        run = start(
            rank, size, folder / method, *words, "parallel=cp", f"parallel.cp={size}", f"parallel.cp_method={method}"
        )
        weights = {p.untyped_storage().data_ptr() for p in run.engine.module.parameters()}
        storages: dict[int, int] = {}

        def note(
            tensor: torch.Tensor, weights: set[int] = weights, storages: dict[int, int] = storages
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = run.engine.loss(*run.samples.batch("val", np.zeros(1, dtype=np.int64)))
        found[method] = sum(storages.values())
        assert loss.isfinite()
    return found


def test_activations_are_dealt_out(tmp_path: Path) -> None:
    whole = run_distributed(kept_bytes, 1, tmp_path / "alone")[0]["ring"]
    for found in run_distributed(kept_bytes, 2, tmp_path / "shared"):
        assert found["ring"] < 0.55 * whole
        assert found["ring"] < found["allgather"] < 0.7 * whole


def lively(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Runs that cannot equal one process: with noise, and in half precision."""
    found = {}
    for name, words in {
        "noise": ["model.dropout=0.5"],
        "ring": ["precision=bf16", "parallel.cp_method=ring"],
        "allgather": ["precision=bf16"],
    }.items():
        run = start(rank, size, folder / name, "parallel=cp", "optim.max_micro_batch=16", *words)
        found[name] = [step(run)[0] for _ in range(3)]
    state = torch.get_rng_state()
    return found | {"drawn": state.sum().item()}


def test_noise_is_each_ranks_own_and_half_precision_stays_close(tmp_path: Path) -> None:
    first, second = run_distributed(lively, 2, tmp_path / "runs")
    assert first["drawn"] != second["drawn"]
    assert all(map(math.isfinite, first["noise"])) and len(set(first["noise"])) == 3
    plain = run_distributed(plain_losses, 1, tmp_path / "alone")[0]
    for method in METHODS:
        assert first[method] == pytest.approx(plain, rel=2e-3)


def plain_losses(rank: int, size: int, folder: Path) -> list[float]:
    run = start(rank, size, folder / "plain", "parallel=ddp", "optim.max_micro_batch=16", "precision=bf16")
    return [step(run)[0] for _ in range(3)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["parallel.cp=4", "model.block_size=36"], "parallel.cp=4 with model.block_size=36"),
        ([*MODELS["experts"], "model.capacity_factor=1.5"], "model.capacity_factor=1.5"),
        (["parallel.cp_method=ring", "model.dropout=0.1"], "parallel.cp_method=ring with model.dropout=0.1"),
        (["compile=default", "recompute=selective"], "parallel.cp=2 with recompute=selective"),
        (["parallel.strategy=zero1"], "parallel.strategy=zero1 with parallel.cp=2"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_the_fix_is_accepted(words: list[str], found: str) -> None:
    def composed(*more: str) -> TrainConfig:
        config = config_from([*TINY, "parallel=cp", *words, *more])
        config.validate()
        return config

    with pytest.raises(ConfigError) as refused:
        check_parallel_dims(composed(), 4)
    assert found in refused.value.found
    for fix in refused.value.fix.split(", or "):
        check_parallel_dims(composed(*fix.split()), 4)
