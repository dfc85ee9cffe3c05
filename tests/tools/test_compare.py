"""Comparing runs whose records were made by hand, so that every figure is known."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt import smoke
from gpt.compare import curve, interpolate, main
from launch.runs.folder import RunFolder, append_json_lines, write_json
from tests.support.commands import call, python, run


def a_run(path: Path, *, steps: int, batch: int, first: float, data: str = "d1", **model: Any) -> None:
    """A run on sequences of 10 tokens whose loss falls by 0.01 a token-step of 10, evaluated every third step."""
    folder = RunFolder(path)
    folder.config.parent.mkdir(parents=True)
    config = {"model": {"name": path.name, "n_embd": 64, **model}, "optim": {"global_batch": batch}, "seed": 1}
    folder.config.write_text(yaml.safe_dump(config))
    ranks = [{"device_name": "NVIDIA H200"}]
    start = {"global_batch": batch, "block_size": 10, "parameters": 7, "world_size": 1, "ranks": ranks}
    write_json(folder.environment(1), start | {"data_sha256": data})
    for step in range(1, steps + 1):
        loss = first - 0.01 * step * batch
        record: dict[str, Any] = {"step": step, "attempt": 1, "loss": loss, "step_time_s": 0.5, "tokens_per_s": 100.0}
        if step % 3 == 0:
            record |= {"val_loss": loss + 1, "time": 1.0}
        append_json_lines(folder.metrics(0), [record])
    folder.record_event("finished")


def compared(folder: Path) -> tuple[dict[str, dict[str, str]], str]:
    """Rows of the CSV by run, and what was printed."""
    text = call(main, folder, "--output", folder / "out")
    rows = csv.DictReader((folder / "out" / "compare.csv").open())
    return {row["run"]: row for row in rows}, text


def test_losses_at_equal_tokens(tmp_path: Path) -> None:
    a_run(tmp_path / "one", steps=40, batch=1, first=5.0)
    a_run(tmp_path / "two", steps=8, batch=4, first=6.0, n_embd=96, newer=1)
    rows, text = compared(tmp_path)
    assert (rows["one"]["tokens"], rows["two"]["tokens"]) == ("400", "320")
    # At 320 tokens: of the first run the mean of steps 31 and 32, of the second the last step alone.
    assert float(rows["one"]["loss_at_equal_tokens"]) == pytest.approx(5.0 - 0.315)
    assert float(rows["two"]["loss_at_equal_tokens"]) == pytest.approx(6.0 - 0.32)
    # Evaluated at steps 30 and 33: on the line between. The second run's last evaluation is at 240 tokens.
    assert float(rows["one"]["val_loss_at_equal_tokens"]) == pytest.approx(6.0 - 0.32)
    assert rows["two"]["val_loss_at_equal_tokens"] == ""
    assert "* at 320 tokens" in text
    assert (rows["one"]["model.n_embd"], rows["two"]["model.n_embd"]) == ("64", "96")
    assert {"optim.global_batch"} <= rows["one"].keys() and not {"model.name", "model.newer", "seed"} & rows[
        "one"
    ].keys()


def test_runs_are_called_by_their_labels(tmp_path: Path) -> None:
    for group, name, typed in (("s", "cut-1f", "lr=1"), ("s", "cut-2e", "lr=2"), ("t", "default", "cluster=local")):
        a_run(tmp_path / group / name, steps=4, batch=1, first=5.0)
        RunFolder(tmp_path / group / name).overrides.write_text(yaml.safe_dump(["seed=3", typed]))
    rows, text = compared(tmp_path)
    assert [*rows] == ["s/lr=1", "s/lr=2", "t/t"] and "cut-" not in text


def test_what_cannot_be_compared_is_not(tmp_path: Path) -> None:
    a_run(tmp_path / "one", steps=4, batch=1, first=5.0)
    a_run(tmp_path / "two", steps=4, batch=1, first=5.0, data="d2")
    a_run(tmp_path / "new", steps=0, batch=1, first=5.0)
    rows, text = compared(tmp_path)
    assert all(row["loss_at_equal_tokens"] == "" for row in rows.values())
    assert "trained on different data" in text and "architecture: the same" in text
    assert "two or more" in call(main, tmp_path / "one", status=2)


def test_interpolation_stays_within_the_curve() -> None:
    losses = curve([(10, 3.0), (20, 1.0)])
    assert [interpolate(losses, x) for x in (5, 10, 15, 20, 21)] == [None, 3.0, 2.0, 1.0, None]


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    python("import sys, gpt.compare; sys.exit('torch' in sys.modules)", cwd=tmp_path)


def test_all_holds_here(tmp_path: Path) -> None:
    lines = run("gpt.smoke", cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("ok")] == [
        "ok  training", "ok  saving", "ok  resuming", "ok  writing",
    ]  # fmt: skip
    assert "all holds" in lines[-1] and not any(tmp_path.iterdir()), "nothing is left behind"


def test_its_help_is_shown_and_nothing_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        smoke.main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "KEY=VALUE" in text and "ok  " not in text


def test_what_does_not_hold_is_said_and_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(overrides: Sequence[str], folder: Path) -> Iterator[tuple[str, str]]:
        yield "training", "fine"
        smoke.require(False, "1 parameters, and 2 planned")

    monkeypatch.setattr(smoke, "checks", broken)
    assert call(smoke.main, status=1) == "ok  training: fine\nFAILED: 1 parameters, and 2 planned\n"
