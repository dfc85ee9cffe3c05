"""A model split into pipeline stages learns what one process learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpt.training.checkpoints import save
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, assert_same, evaluated, learn, start, step

Words = list[str]
BASE = {
    **{name: [*words, "model.n_layer=4"] for name, words in MODELS.items()},
    "biased experts": [
        *(*MODELS["experts"], "model.n_layer=4", "model.expert_balance=bias"),
        "model.balance_bias_rate=0.05",
    ],
    # its output matrix costs more than a block, so that the last of four stages has nothing else
    "large vocabulary": [*MODELS["experts"], "model.n_layer=4", "model.vocab_size=2048"],
    "a block a stage": MODELS["tied"],
}
EVAL = ["eval.sequences=7"]


def pipeline(schedule: str, *words: str, pp: int = 2, micro: int = 4) -> Words:
    return [f"parallel.pp={pp}", f"parallel.schedule={schedule}", f"optim.max_micro_batch={micro}", *words]


FSDP = ("parallel=fsdp", "optim.max_micro_batch=2")
KEPT = (*FSDP, "parallel.reshard_after_forward=false")
V_SHAPED = ("zbv", "dualpipev")
ON_2: list[tuple[str, Words]] = [
    *(("tied", pipeline(schedule)) for schedule in ("gpipe", "interleaved", *V_SHAPED)),
    ("untied, grouped queries", pipeline("zbv")),
    ("tied", pipeline("1f1b", micro=2)),
    ("biased experts", pipeline("zbv")),
    ("biased experts", pipeline("1f1b", "recompute=full")),
    ("biased experts", pipeline("interleaved", "recompute=selective")),
]
ON_4: list[tuple[str, Words]] = [
    ("tied", pipeline("1f1b", micro=2)),
    ("large vocabulary", pipeline("1f1b", pp=4)),
    ("untied, grouped queries", pipeline("interleaved", *FSDP)),
    ("tied", pipeline("zbv", *KEPT)),
    ("tied", pipeline("zbv", "parallel=tp")),
    ("biased experts", pipeline("interleaved", "parallel=tp", "recompute=full")),
    ("biased experts", pipeline("dualpipev", *KEPT, "parallel.ep=2")),
]
ON_8: list[tuple[str, Words]] = [("a block a stage", ["parallel=3d", "optim.max_micro_batch=4"])]
"""Four micro-batches a step; eight in one case, and two on eight ranks."""
TABLES = {2: ON_2, 4: ON_4, 8: ON_8}


def learn_table(rank: int, size: int, folder: Path, table: list[tuple[str, Words]]) -> list[dict[str, Any]]:
    found = []
    for i, (model, words) in enumerate(table):
        run = start(rank, size, folder / str(i), *EVAL, *BASE[model], *words)
        mine = learn(run)
        mine["evaluated"] = evaluated(run)
        if i == 0:
            assert evaluated(run) == mine["evaluated"]
        mine["after"] = step(run)  # not disturbed by that
        found.append(mine)
    return found if rank == 0 else []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    table = [(model, ["parallel=ddp", "optim.max_micro_batch=16"]) for model in BASE]
    found = run_distributed(learn_table, 1, tmp_path_factory.mktemp("alone") / "runs", table)[0]
    return dict(zip(BASE, found, strict=True))


@pytest.fixture(scope="module", params=list(TABLES))
def parallelized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, Words, Any]]:
    table = TABLES[request.param]
    folder = tmp_path_factory.mktemp(f"on_{request.param}") / "runs"
    found = run_distributed(learn_table, request.param, folder, table, timeout_s=400)[0]
    return [(model, words, each) for (model, words), each in zip(table, found, strict=True)]


def test_a_pipeline_learns_what_one_process_learns(
    parallelized: list[tuple[str, Words, Any]], reference: dict[str, dict[str, Any]]
) -> None:
    wrong = []
    for model, words, found in parallelized:
        expected = reference[model]
        try:
            assert_same(found, expected)
            assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)
            assert found["after"] == pytest.approx(expected["after"], rel=2e-5)
        except AssertionError as error:
            wrong.append(f"{model} {' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


CROSSED: dict[str, Words] = {
    "fsdp": ["parallel=fsdp"],
    "pp": pipeline("1f1b", pp=4),
    "interleaved": pipeline("interleaved"),
    "zbv, fsdp": pipeline("zbv", *KEPT),
    "interleaved, tp": pipeline("interleaved", "parallel=tp"),
}


CROSSINGS = {
    **{"pp": "zbv, fsdp", "zbv, fsdp": "fsdp"},
    **{"fsdp": "interleaved, tp", "interleaved, tp": "pp"},
}
"""Each saved once, and gone on under once."""


def cross(rank: int, size: int, folder: Path) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Save under each, go on under another: the losses of the steps after, and those that were to come."""
    found = {}
    words = BASE["tied"]
    for saved, resumed in CROSSINGS.items():
        there = folder / saved.replace(", ", "_")
        run = start(rank, size, there, *CROSSED[saved], *words)
        step(run)
        save(run)
        to_come = [step(run)[0] for _ in range(2)]
        again = start(rank, size, there, *CROSSED[resumed], *words)
        assert again.step == 1
        found[saved, resumed] = ([step(again)[0] for _ in range(2)], to_come)
    return found


def test_a_checkpoint_goes_from_each_pipeline_to_another_and_to_none_and_back(tmp_path: Path) -> None:
    found = run_distributed(cross, 4, tmp_path / "runs", timeout_s=300)[0]
    assert {saved for saved, _ in found} == {resumed for _, resumed in found} == set(CROSSINGS)
    for pair, (losses, to_come) in found.items():
        assert losses == pytest.approx(to_come, rel=1e-6), pair


def noisy(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """With dropout: a resumed run against the uninterrupted one. In bf16: what is learned. And the signs of life."""
    words = [*BASE["tied"], "model.dropout=0.2"]
    found: dict[str, Any] = {}
    for name in ("pp", "interleaved", "zbv, fsdp"):
        there = folder / name.replace(", ", "_")
        run = start(rank, size, there, *CROSSED[name], *words)
        step(run)
        save(run)
        to_come = [step(run) for _ in range(2)]
        again = start(rank, size, there, *CROSSED[name], *words)
        found[name] = (to_come, [step(again) for _ in range(2)])
    for name, spread_so in {"ddp": ["parallel=ddp"], "pp": CROSSED["pp"], "fsdp": CROSSED["zbv, fsdp"]}.items():
        run = start(rank, size, folder / f"bf16{name}", *spread_so, *words, "model.dropout=0", "precision=bf16")
        found[f"bf16 {name}"] = [step(run)[0] for _ in range(2)]
    calls: list[None] = []
    batch = run.samples.batch("train", list(range(run.batch.per_rank)))
    run.engine.backward(*batch, lambda: calls.append(None))
    return {**found, "calls": len(calls)}


def test_dropout_bf16_and_signs_of_life(tmp_path: Path) -> None:
    for found in run_distributed(noisy, 4, tmp_path / "runs", timeout_s=300):
        for name in ("pp", "interleaved", "zbv, fsdp"):
            assert found[name][0] == found[name][1], f"{name}: bit for bit"
        for name in ("pp", "fsdp"):
            assert found[f"bf16 {name}"] == pytest.approx(found["bf16 ddp"], rel=5e-3)
        assert found["calls"] == 2 * 4  # two stages, four micro-batches
