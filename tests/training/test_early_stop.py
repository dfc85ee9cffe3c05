"""A run is over before its last step where its validation loss is low enough or no longer falls, and stays over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt.config import OptimConfig
from gpt.training.health import EarlyStop, refuse_unknown_text
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from tests.support.commands import TINY, run
from tests.support.composing import config_from


def judge(**changes: float) -> EarlyStop:
    sizes = {"max_steps": 9, "global_batch": 1, "max_micro_batch": 1, "lr": 1e-3, "min_lr": 0.0, "warmup_steps": 0}
    return EarlyStop(OptimConfig(**{**sizes, **changes}))  # type: ignore[arg-type]


def over_at(stop: EarlyStop, losses: list[float]) -> int | None:
    for step, loss in enumerate(losses, 1):
        stop.add(10 * step, loss)
        if stop.reason() is not None:
            return 10 * step
    return None


def test_the_losses_that_end_a_run() -> None:
    falling = [3.0, 2.0, 1.6, 1.55, 1.5]
    assert over_at(judge(), falling) is None
    assert over_at(judge(target_val_loss=1.55), falling) == 40, "at most, not below"
    assert over_at(judge(patience=1), falling) is None
    waiting = [3.0, 3.1, 2.9, 2.9, 3.0, 2.95, 2.8]
    assert over_at(judge(patience=3), waiting) == 60, "an equal loss is none that is lower"
    assert over_at(judge(patience=4), waiting) is None


def test_a_target_per_byte_of_text() -> None:
    stop = judge(target_val_nats_per_byte=0.5)
    stop.add(10, 3.0, 1.0)
    assert stop.reason() is None, "a bit is 0.69 nats"
    stop.add(20, 2.0, 0.72)
    reason = stop.reason()
    assert reason == "val_loss 2.0000 at step 20 (0.4991 nats per byte) reached optim.target_val_nats_per_byte=0.5"
    resumed = judge(target_val_nats_per_byte=0.5)
    resumed.load(json.loads(json.dumps(stop.state())))
    assert resumed.reason() == reason
    config = config_from(["data=synthetic", "optim.target_val_nats_per_byte=0.5"])
    refuse_unknown_text(config, 100.0)
    with pytest.raises(ConfigError, match="whose bytes of text are unknown"):
        refuse_unknown_text(config, None)


@pytest.mark.parametrize("break_at", range(7))
def test_a_resumed_run_counts_on(break_at: int) -> None:
    waiting = [3.0, 3.1, 2.9, 2.9, 3.0, 2.95, 2.8]
    first, then = judge(patience=3), judge(patience=3)
    over = over_at(first, waiting[:break_at])
    then.load(json.loads(json.dumps(first.state())))
    for step, loss in enumerate(waiting, 1):
        if over is None and step > break_at:
            then.add(10 * step, loss)
            over = 10 * step if then.reason() else None
    assert over == 60


def test_it_takes_evaluations_during_training() -> None:
    with pytest.raises(ConfigError, match=r"optim\.patience=2 with eval\.interval=0"):
        config_from(["optim.patience=2", "eval.interval=0"]).validate()
    with pytest.raises(ConfigError, match=r"optim\.target_val_loss"):
        config_from(["optim.target_val_loss=0"]).validate()


def test_a_run_ends_at_its_target_stays_ended_and_goes_on_for_a_lower_one(tmp_path: Path) -> None:
    words = [*TINY, "device=cpu", "optim.max_steps=6", "eval.interval=2", "checkpoint.interval=0", "run_dir=run"]
    words += ["logging.tensorboard=false"]
    text = run("gpt.train", *words, "optim.target_val_loss=100", cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    assert "finished early: val_loss" in text and "reached optim.target_val_loss=100" in text
    (end,) = (event for event in folder.read_events() if event["event"] == "finished")
    assert end["step"] == 2 and "at step 2 (" in end["early"] and " nats per byte) reached" in end["early"]
    assert [path.name for path in folder.checkpoints.glob("step_*")] == ["step_00000002"], "saved as a last step is"
    assert "finished early: val_loss" in run("launch.status", "run", cwd=tmp_path)
    assert "is over at step 2" in run("gpt.train", *words, "optim.target_val_loss=100", cwd=tmp_path)
    text = run("gpt.train", *words, "optim.target_val_loss=0.1", cwd=tmp_path)
    assert "from step 2 of 6" in text and (folder.checkpoints / "step_00000006").is_dir()
