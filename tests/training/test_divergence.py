"""Steps whose numbers go wrong are skipped by all ranks or none; a run goes back, passes over batches, and gives up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt.config import DivergenceConfig
from gpt.data.order import PassedOver
from gpt.model.gpt import Block
from gpt.parallel.modules import local_tensor
from gpt.train import train
from gpt.training.guards import SPIKE_WINDOW, BadSteps, DivergenceGuard, checkpoint_before, last_rollback
from gpt.training.run import Run
from gpt.training.step import queue_step
from launch.errors import RepeatedFailureError
from launch.runs.process import Phase
from launch.runs.records import StepRecord, read_records
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, DEEPSPEED, MODELS, start

ENGINES = {
    "ddp": [],
    "zero1": [],
    "fsdp": [],
    "tp parallel.tp=2": [],
    "pp parallel.pp=2": MODELS["tied"],
    "ep parallel.ep=2": [*MODELS["experts"], "model.expert_balance=bias"],
    "ds_zero0": [],
    "zero2": [],
    "zero3": [],
    "ds_pp_zero1": [],
}
ONE_LAYER = "model.n_layer=1"
"""Of engines that have no pipeline, whose stages want a layer each."""
GRADIENTS_OF_TORCH = ("ddp", "zero1", "fsdp", "tp parallel.tp=2", "pp parallel.pp=2")
STEPS = 11
LONG = [
    *(f"optim.max_steps={STEPS}", "checkpoint.interval=3", "checkpoint.keep_last=3", "eval.interval=0", ONE_LAYER),
    *("model.dropout=0.1", "optim.max_micro_batch=8"),
    "divergence.max_skipped_steps=3",
]


def words_of(engine: str) -> list[str]:
    layers = [] if "pp" in engine else [ONE_LAYER]
    return [*f"parallel={engine}".split(), "optim.max_micro_batch=4", *layers]


def record(
    step: int, loss: float | None = 2.0, grad_norm: float | None = 1.0, scale: float | None = None
) -> StepRecord:
    return StepRecord(step, 1, loss, 1e-3, grad_norm, 8, (0, 7), 0.1, loss_scale=scale)


# The judge, and the batches.


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), max_size=6), st.integers(1, 40))
def test_the_batches_of_the_steps_are_those_that_are_not_passed_over(spans: list[tuple[int, int]], steps: int) -> None:
    passed_over, gone = PassedOver(), set()
    for first, more in spans:
        gone |= {*range(first, first + more + 1)}
        passed_over = passed_over.including(range(first, first + more + 1))
    left = [number for number in range(1, 200) if number not in gone]
    assert [passed_over.batch_of(step) for step in range(1, steps + 1)] == left[:steps]
    assert PassedOver.of(json.loads(json.dumps(passed_over.ranges))) == passed_over


def test_a_streak_of_skipped_steps_is_what_a_run_goes_back_for() -> None:
    guard = DivergenceGuard(DivergenceConfig(max_skipped_steps=3))
    assert [guard.judge(record(step)) for step in (1, 2)] == [None, None]
    assert guard.judge(record(3, None)) is None and not guard.may_save
    assert guard.judge(record(4)) is None and guard.may_save, "one alone is skipped and forgotten"
    bad = [guard.judge(record(5, None)), guard.judge(record(6, 2.0, None)), guard.judge(record(7, None, None))]
    assert bad[:2] == [None, None]
    assert bad[2] == BadSteps(5, 7, "3 steps in a row with a loss or gradients that are not finite")
    assert guard.skipped == 4
    assert guard.judge(record(8)) is None and guard.judge_end() is None
    assert guard.judge(record(9, 2.0, None)) is None
    assert guard.judge_end() == BadSteps(9, 9, "a loss or gradients that are not finite, up to the end of the run")


def test_an_overflow_that_the_loss_scale_provides_for_is_counted_and_no_fault() -> None:
    guard = DivergenceGuard(DivergenceConfig(max_skipped_steps=1))
    told = record(1, 2.0, None, scale=2.0)
    assert guard.judge(told) is None and guard.may_save and told.skipped_steps == 1
    assert guard.judge(record(2, 2.0, None, scale=1.0)) is not None, "at the least scale it is no overflow"


def test_a_spike_is_found_where_it_is_asked_for_and_the_window_resumes() -> None:
    losses = [2.0, *(2.1, 1.9, 2.0, 2.05) * (SPIKE_WINDOW // 4)]
    quiet = DivergenceGuard(DivergenceConfig())
    guard = DivergenceGuard(DivergenceConfig(spike_sigmas=6.0))
    for step, loss in enumerate(losses, 1):
        assert guard.judge(record(step, loss)) is None and quiet.judge(record(step, loss)) is None
    again = DivergenceGuard(DivergenceConfig(spike_sigmas=6.0))
    again.load(json.loads(json.dumps(guard.state(len(losses)))))
    after = len(losses) + 1
    window = torch.tensor(losses[1:], dtype=torch.float64)
    limit = (window.mean() + 6 * window.std(correction=0)).item()
    assert again.judge(record(after, limit - 1e-6)) is None
    spike = guard.judge(record(after, limit + 1e-6))
    assert spike is not None and (spike.first, spike.last) == (after, after) and "100 steps" in spike.cause
    assert quiet.judge(record(6, 1e9)) is None
    assert quiet.judge_evaluation(7, 3.0) is None
    assert quiet.judge_evaluation(7, math.nan) == BadSteps(7, 7, "a validation loss of nan after step 7")


def test_the_checkpoint_to_go_back_to_has_given_a_finite_loss_where_there_is_such_a_one() -> None:
    assert checkpoint_before([3, 6, 9], 7) == 3, "the weights of step 6 have given none"
    assert checkpoint_before([3, 6, 9], 8) == 6
    assert checkpoint_before([6, 9], 7) == 6
    assert checkpoint_before([9], 7) is None


def test_rollbacks_are_forgiven_by_a_checkpoint_beyond_and_found_again_in_the_event_log() -> None:
    guard = DivergenceGuard(DivergenceConfig())
    guard.gone_back(16, 1)
    assert guard.state(16)["rollbacks"] == 1 and guard.state(17)["rollbacks"] == 0
    saved, back = {"event": "saved", "step": 6}, {"event": "rolled_back", "step": 6, "rollbacks": 1}
    assert last_rollback([saved, back], 6) is back and last_rollback([saved, back], 3) is None
    assert last_rollback([saved, back, saved], 6) is None, "saved again since, with what was passed over"


# Every engine.


def weights(run: Run) -> list[Tensor]:
    """Copies of what this rank holds of the parameters."""
    held = (getattr(p, "ds_tensor", local_tensor(p.detach())) for p in run.engine.module.parameters())
    return [tensor.clone() for tensor in held]


def spoil_activations(run: Run, is_due: Callable[[], bool]) -> None:
    """Have this rank compute no numbers in a layer of its model."""
    block = next(m for m in run.engine.module.modules() if isinstance(m, Block))
    block.register_forward_hook(lambda module, inputs, output: output * math.nan if is_due() else None)


def spoil_gradients(run: Run, is_due: Callable[[], bool]) -> None:
    """Have one gradient of this rank become infinite after they were reduced, so that the others see none of it."""
    backward = run.engine.backward

    def spoiled(*args: Any) -> Tensor:
        loss = backward(*args)
        if is_due():
            next(local_tensor(p.grad) for p in run.engine.trained.parameters() if p.grad is not None).fill_(math.inf)
        return loss

    run.engine.backward = spoiled  # type: ignore[method-assign]


def skip_one(rank: int, size: int, folder: Path, cases: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Spoil the second of three steps on one rank; what each step told, and whether it changed the weights."""
    found = {}
    for number, (engine, what) in enumerate(cases):
        run = start(rank, size, folder / str(number), *words_of(engine), *ENGINES[engine])
        if rank == size - 1:
            {"activations": spoil_activations, "gradients": spoil_gradients}[what](run, lambda r=run: r.step == 1)
        records, changed = [], []
        for _ in range(3):
            before = weights(run)
            told, _ = queue_step(run, None, Phase.training).finish(0.0)
            run.guard.judge(told)
            records.append((told.loss, told.grad_norm, told.skipped_steps))
            changed.append(not all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True)))
        buffers = [b for name, b in run.engine.module.named_buffers() if "balance_bias" in name]
        found[engine, what] = {"records": records, "changed": changed, "bias": [b.tolist() for b in buffers]}
    return found


def test_what_one_rank_computes_wrongly_is_skipped_by_all_under_every_engine(tmp_path: Path) -> None:
    cases = [(engine, "activations") for engine in ENGINES] + [(name, "gradients") for name in GRADIENTS_OF_TORCH]
    ranks = run_distributed(skip_one, 2, tmp_path / "runs", cases, timeout_s=500, imports=DEEPSPEED)
    for case in cases:
        for rank, told in enumerate(ranks):
            name = f"{case}, rank {rank}"
            first, second, third = told[case]["records"]
            assert first[2] is None and None not in first[:2], name
            assert second[1] is None and second[2] == 1, name
            assert (second[0] is None) == (case[1] == "activations"), name
            assert None not in third[:2] and third[2] == 1, f"{name}: it learns on"
            assert told[case]["changed"] == [True, False, True], name
    assert ranks[0]["ep parallel.ep=2", "activations"]["bias"] == ranks[1]["ep parallel.ep=2", "activations"]["bias"]


# The loop.


def kill_after_rollback(run: Run) -> None:
    """End the run in the second step after it went back."""
    backward = run.engine.backward

    def killed(*args: Any) -> Tensor:
        if run.guard.rollbacks and run.step == 4:
            raise KeyboardInterrupt("killed")
        return backward(*args)

    run.engine.backward = killed  # type: ignore[method-assign]


def go_through(
    rank: int, size: int, folder: Path, words: list[str], is_due: Callable[[Run], bool], passed_over: PassedOver
) -> dict[str, Any]:
    """Train with one rank that computes no numbers where ``is_due``; how it went, and what a new start finds."""
    run = start(rank, size, folder, *LONG, *words)
    run.worker.rank = rank
    run.worker.open_folder(run.folder.path, 1)
    run.batches.passed_over = passed_over
    if rank == 1:
        spoil_activations(run, lambda: is_due(run))
    if folder.name == "killed":
        kill_after_rollback(run)
    failure = None
    try:
        train(run)
    except (RepeatedFailureError, KeyboardInterrupt) as error:
        failure = str(error)
    again = start(rank, size, folder, *LONG, *words)
    return {
        "failure": failure,
        "step": run.step,
        "weights": weights(run),
        "events": run.folder.read_events(),
        "records": read_records(run.folder.metrics(rank)),
        "csv": run.folder.steps_csv.read_text().splitlines(),
        "summary": json.loads(run.folder.run_json.read_bytes())["summary"] if failure is None else None,
        "saved": run.checkpoints.steps(),
        "again": (again.step, again.batches.passed_over.ranges, again.guard.rollbacks),
    }


def in_step_7(run: Run) -> bool:
    return run.step == 6


def in_batches_7_to_9(run: Run) -> bool:
    return 7 <= run.batches.passed_over.batch_of(run.step + 1) <= 9


def from_step_7(run: Run) -> bool:
    return run.step >= 6


def never(run: Run) -> bool:
    return False


def go_through_all(rank: int, size: int, folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, is_due, passed_over, words in (
        ("once", in_step_7, PassedOver(), []),
        # The step that the run goes back for is the one before those that are profiled.
        ("three", in_batches_7_to_9, PassedOver(), ["profile=true"]),
        ("quiet", never, PassedOver(((7, 9),)), []),
        ("always", from_step_7, PassedOver(), ["divergence.max_skipped_steps=4"]),
        ("killed", in_batches_7_to_9, PassedOver(), []),
    ):
        with mock.patch("gpt.training.diagnostics.PROFILE_FROM", 10):
            found[name] = go_through(rank, size, folder / name, ["parallel=ddp", *words], is_due, passed_over)
    return found


Ranks = list[dict[str, dict[str, Any]]]
"""Findings of each rank in each case."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_distributed(
        go_through_all, 2, tmp_path_factory.mktemp("divergence") / "runs", timeout_s=300, imports=DEEPSPEED
    )


def test_one_bad_step_is_skipped_counted_and_told(ranks: Ranks) -> None:
    for rank, told in enumerate(ranks):
        once = told["once"]
        assert once["failure"] is None and once["step"] == STEPS
        skipped = [(r["step"], r["skipped_steps"]) for r in once["records"] if "skipped_steps" in r]
        assert skipped == [(step, 1) for step in range(7, STEPS + 1)]
        if rank == 0:
            assert [r["step"] for r in once["records"] if "loss" not in r] == [7]
    events = ranks[0]["once"]["events"]
    (event,) = [e for e in events if e["event"] == "step_skipped"]
    assert (event["step"], event["batches"], event["samples"]) == (7, [[7, 7]], [[6 * BATCH, 7 * BATCH - 1]])
    assert ranks[0]["once"]["summary"]["skipped_steps"] == 1


def test_three_in_a_row_are_passed_over_as_if_they_had_never_been(ranks: Ranks) -> None:
    for told in ranks:
        three, quiet = told["three"], told["quiet"]
        assert three["failure"] is None and three["step"] == STEPS
        torch.testing.assert_close(three["weights"], quiet["weights"], rtol=0, atol=0)
        made, expected = (
            [(r["step"], r["samples"], r.get("loss")) for r in each["records"]] for each in (three, quiet)
        )
        assert made == expected
        assert three["again"] == (STEPS, ((7, 9),), 0)
    three, quiet = ranks[0]["three"], ranks[0]["quiet"]
    assert all("loss" in record for record in three["records"])
    assert len(three["csv"]) == 1 + STEPS, "one row a step"
    assert [r["step"] for r in three["records"] if r.get("restore_s", 0) > 0] == [4], (
        "the first one after the roll-back"
    )
    assert not any("restore_s" in r for r in quiet["records"]), "it began anew"
    (event,) = [e for e in three["events"] if e["event"] == "rolled_back"]
    assert (event["first"], event["last"], event["step"], event["rollbacks"]) == (7, 9, 3, 1)
    assert event["batches"] == event["passed_over"] == [[7, 9]]
    assert event["samples"] == [[6 * BATCH, 9 * BATCH - 1]]
    records = [record for told in ranks for record in told["three"]["records"]]
    used = [s for r in records for s in range(r["samples"][0], r["samples"][1] + 1)]
    assert sorted(used) == [s for b in (*range(6), *range(9, STEPS + 3)) for s in range(b * BATCH, (b + 1) * BATCH)]


def test_what_comes_again_ends_the_run_with_step_and_batch_named(ranks: Ranks) -> None:
    for told in ranks:
        always = told["always"]
        assert always["failure"] is not None
        assert "found: steps 7 to 10: 4 steps in a row with a loss or gradients that" in always["failure"]
        assert f"batches 15 to 18 (samples {14 * BATCH} to {18 * BATCH - 1})" in always["failure"]
        assert "gone back 2 times" in always["failure"] and "type next: optim.lr=" in always["failure"]
        assert max(always["saved"]) <= 6, "nothing is saved while steps are skipped"
        assert always["again"] == (6, ((7, 14),), 2), "the next start knows"
    events = ranks[0]["always"]["events"]
    assert [e["rollbacks"] for e in events if e["event"] == "rolled_back"] == [1, 2]
    rows = [row.split(",")[0] for row in ranks[0]["always"]["csv"][1:]]
    assert rows == [str(step) for step in range(1, 11)], "up to the step that ended it"


def test_a_run_that_is_killed_after_it_went_back_still_passes_over_the_batches(
    ranks: Ranks,
) -> None:
    for told in ranks:
        assert told["killed"]["failure"] == "killed"
        assert told["killed"]["again"] == (3, ((7, 9),), 1), "before a checkpoint could tell it"


def go_back_under(rank: int, size: int, folder: Path, engines: list[str]) -> dict[str, tuple[int, bool]]:
    """Go back for batches 5 and 6 under each engine; the roll-backs, and whether the weights are the quiet run's."""
    found = {}
    words = ["optim.max_steps=6", "checkpoint.interval=2", "eval.interval=0"]
    words += ["divergence.max_skipped_steps=2", "model.dropout=0.1"]
    for number, engine in enumerate(engines):
        ends = []
        for quiet in (True, False):
            run = start(rank, size, folder / f"{number}{quiet}", *words_of(engine), *words, *ENGINES[engine])
            if quiet:
                run.batches.passed_over = PassedOver(((5, 6),))
            elif rank == size - 1:
                spoil_activations(run, lambda r=run: r.batches.passed_over.batch_of(r.step + 1) in (5, 6))
            run.worker.rank = rank
            run.worker.open_folder(run.folder.path, 1)
            train(run)
            ends.append(weights(run))
        back = [event for event in run.folder.read_events() if event["event"] == "rolled_back"]
        found[engine] = len(back), all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    return found


def test_every_kind_of_engine_goes_back_to_the_same_weights(tmp_path: Path) -> None:
    engines = ["zero1", "fsdp", "pp parallel.pp=2", "zero2", "zero3"]
    ranks = run_distributed(go_back_under, 2, tmp_path / "runs", engines, timeout_s=300, imports=DEEPSPEED)
    assert ranks == [dict.fromkeys(engines, (1, True))] * 2
