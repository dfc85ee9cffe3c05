"""DeepSpeed's pipeline learns what one process learns, and its checkpoints go on with other stages and strategies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gpt.conversion.state_dict import load_model
from gpt.training.checkpoints import save
from gpt.training.run import Run
from launch.errors import ConfigError
from tests.parallel.test_deepspeed import as_composed, broken
from tests.support.distributed import run_distributed
from tests.support.learning import DEEPSPEED, MODELS, assert_same, evaluated, learn, start, step, whole

LAYERS = ["model.n_layer=2", "eval.sequences=7"]
HERE = {
    "tied": [*MODELS["tied"], *LAYERS],
    "untied, grouped queries": [*MODELS["untied, grouped queries"], *LAYERS],
    "biased experts": [*MODELS["experts"], *LAYERS, "model.expert_balance=bias", "model.balance_bias_rate=0.05"],
    # its output matrix costs more than a block, so that the last of four stages has nothing else
    "large vocabulary": [*MODELS["tied"], *LAYERS, "model.n_layer=4", "model.vocab_size=2048"],
    "bf16": [*MODELS["tied"], *LAYERS, "precision=bf16"],
}
COMPILED = ["compile=default", "recompute=full"]
CASES: dict[int, list[tuple[str, int, int, int, list[str]]]] = {
    2: [
        ("tied", 0, 2, 16, []),
        ("tied", 1, 2, 4, COMPILED),
        ("untied, grouped queries", 0, 2, 4, []),
        ("biased experts", 1, 2, 2, []),
        ("bf16", 0, 2, 4, []),
        ("bf16", 1, 2, 4, []),
    ],
    4: [("tied", 1, 2, 2, []), ("biased experts", 0, 2, 2, []), ("large vocabulary", 1, 4, 4, [])],
}
"""By the number of ranks: model, stage of ZeRO, stages of the pipeline, sequences of a micro-batch, and what else."""


def hide_targets(run: Run) -> None:
    """Have most of the first sequences, and some of the others, count fewer tokens: -100 is torch's word for none."""
    batch = run.samples.batch

    def partly(split: Any, indices: Any) -> tuple[Tensor, Tensor]:
        tokens_BT, targets_BT = batch(split, indices)
        for row, index in enumerate(indices):
            targets_BT[row, : (3 * int(index)) % 16] = -100
        return tokens_BT, targets_BT

    run.samples.batch = partly  # type: ignore[method-assign]


def learn_here(run: Run) -> dict[str, Any]:
    """Results of ``learn``; an evaluation that does not divide by the micro-batch; losses of unevenly many tokens."""
    found = learn(run)
    found["evaluated"] = evaluated(run, batch=run.batch.micro)
    hide_targets(run)
    found["uneven"] = [step(run) for _ in range(2)]
    return found


def learn_cases(rank: int, size: int, folder: Path) -> list[dict[str, Any]]:
    found = []
    # What the compiler sees is what is asked here, not the code that it makes in half a minute.
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        for number, (model, zero, pp, micro, others) in enumerate(CASES[size]):
            words = [
                "parallel=ds_pp",
                f"parallel.zero_stage={zero}",
                f"parallel.pp={pp}",
                f"optim.max_micro_batch={micro}",
            ]
            found.append(learn_here(start(rank, size, folder / f"{number}", *HERE[model], *words, *others)))
    return found


def learn_alone_here(rank: int, size: int, folder: Path) -> dict[str, dict[str, Any]]:
    words = ["parallel=ddp", "optim.max_micro_batch=16"]
    return {name: learn_here(start(rank, size, folder / name, *words, *model)) for name, model in HERE.items()}


MIXTURE = [*HERE["biased experts"], "model.tie_embeddings=true", "optim.max_micro_batch=4"]
WAYS = {
    "ds_pp": ["parallel=ds_pp"],
    "ds_pp_zero1": ["parallel=ds_pp_zero1"],
    "bf16": ["parallel=ds_pp_zero1", "precision=bf16"],
    "pp": ["parallel=pp"],
    "zero2": ["parallel=zero2"],
}
CROSSINGS = [
    *(("ds_pp", "ds_pp"), ("ds_pp_zero1", "ds_pp_zero1"), ("bf16", "bf16")),
    *(("ds_pp_zero1", "zero2"), ("ds_pp", "pp"), ("pp", "ds_pp_zero1")),
]


def save_here(rank: int, size: int, folder: Path) -> dict[str, list[float]]:
    """A run of some ways with a checkpoint after a step, and the losses of the next two."""
    to_come = {}
    for way in ("ds_pp", "ds_pp_zero1", "bf16", "pp"):
        run = start(rank, size, folder / way, *MIXTURE, *WAYS[way])
        step(run)
        save(run)
        if way == "ds_pp_zero1":
            remember(run, folder / "weights.pt")
        to_come[way] = [step(run)[0] for _ in range(2)]
    return to_come


def remember(run: Run, path: Path) -> None:
    """Keep the weights that the stages have at the checkpoint."""
    from deepspeed.utils import safe_get_full_fp32_param

    mine = {name: safe_get_full_fp32_param(p) for name, p in run.engine.module.named_parameters()}
    weights = whole(run, mine)
    if run.world.is_first:
        torch.save(weights, path)


def go_on(rank: int, size: int, folder: Path, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], list[float]]:
    found = {}
    for saved, resumed in pairs:
        run = start(rank, size, folder / saved, *MIXTURE, *WAYS[resumed])
        assert run.step == 1
        found[saved, resumed] = [step(run)[0] for _ in range(2)]
    return found


@dataclass(frozen=True)
class Seen:
    """Outcome of two ranks, and their folder."""

    folder: Path
    learned: list[dict[str, Any]]
    to_come: dict[str, list[float]]
    gone_on: dict[tuple[str, str], list[float]]


def on_two(rank: int, size: int, folder: Path) -> Seen:
    learned, to_come = learn_cases(rank, size, folder), save_here(rank, size, folder / "saved")
    gone_on = go_on(rank, size, folder / "saved", CROSSINGS)
    with broken(rank, "torch.load", "Input/output error"), pytest.raises(ConfigError, match=r"rank 1: .*Input/output"):
        start(rank, size, folder / "saved" / "ds_pp_zero1", *MIXTURE, *WAYS["ds_pp_zero1"])
    return Seen(folder / "saved", learned, to_come, gone_on)


def on_four(rank: int, size: int, folder: Path, saved: Path) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    return learn_cases(rank, size, folder), go_on(rank, size, saved, [("ds_pp_zero1", "ds_pp_zero1")])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return run_distributed(on_two, 2, tmp_path_factory.mktemp("two") / "runs", timeout_s=300, imports=DEEPSPEED)[0]


@pytest.fixture(scope="module")
def seen_by_four(seen: Seen, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    return run_distributed(
        on_four, 4, tmp_path_factory.mktemp("four") / "runs", seen.folder, timeout_s=300, imports=DEEPSPEED
    )[0]


def test_a_pipeline_learns_what_one_process_learns(
    seen: Seen, seen_by_four: tuple[list[dict[str, Any]], dict[Any, Any]], tmp_path: Path
) -> None:
    reference = run_distributed(learn_alone_here, 1, tmp_path / "alone" / "runs")[0]
    for size, learned in ((2, seen.learned), (4, seen_by_four[0])):
        for case, found in zip(CASES[size], learned, strict=True):
            expected = reference[case[0]]
            if case[0] == "bf16":
                assert_close_in_bf16(found, expected)
                continue
            assert_same(found, expected)
            assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5), case
            for here, there in zip(found["uneven"], expected["uneven"], strict=True):
                assert here == pytest.approx(there, rel=1e-5), case


def assert_close_in_bf16(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Rounding differs by where it is done: 8 bits, over the steps."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["norms"] == pytest.approx(expected["norms"], rel=2e-2)
    assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-3)
    for name, tensor in expected["weights"].items():
        moved = (found["weights"][name] - tensor).abs().max()
        assert moved < 1e-2, f"{name}: {moved}"


def test_checkpoints_go_on_bit_for_bit_or_without_stages_or_with_others(
    seen: Seen, seen_by_four: tuple[list[dict[str, Any]], dict[Any, Any]]
) -> None:
    for (way, resumed), losses in seen.gone_on.items():
        assert losses == pytest.approx(seen.to_come[way], rel=1e-6), (way, resumed)
        if way == resumed:
            assert losses == seen.to_come[way], f"{way}: bit for bit"
    for (way, _), losses in seen_by_four[1].items():
        assert losses == pytest.approx(seen.to_come[way], rel=1e-6), way


def test_one_process_reads_the_weights_of_all_stages(seen: Seen) -> None:
    way = seen.folder / "ds_pp_zero1"
    as_composed([*MIXTURE, *WAYS["ds_pp_zero1"]], way)
    _, model = load_model(way)
    ours, expected = dict(model.named_parameters()), torch.load(seen.folder / "weights.pt")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    script = "zero_to_fp32.py"
    assert not list(way.glob(f"checkpoints/*/{script}")), "it does not put stages together, so it is not there"
