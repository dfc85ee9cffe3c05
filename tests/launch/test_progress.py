"""Step records from what ranks print: exact fields, steps and times, and an agent that is never held up."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import yaml

from launch.runs import progress
from launch.runs.folder import RunFolder, append_json_lines
from launch.runs.progress import Progress
from launch.runs.records import read_records
from launch.workload import RankContract
from tests.support.commands import ROOT, python
from tests.support.run_folders import read_events, scalars
from tests.support.runs import names

PATTERN = r"step (?P<step>[\d,]+): loss (?P<loss>[\d.e+-]+|nan)(?:, (?P<step_time_ms>[\d.]+) ms)?"


@pytest.fixture(autouse=True)
def every_look_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    for _ in range(2):
        made.create_attempt()
    return made


def watch(
    folder: RunFolder, pattern: str | None = PATTERN, ranks: tuple[int, ...] = (0,), attempt: int = 1
) -> Progress:
    return Progress(folder, attempt, ranks, RankContract(progress=pattern, writes_curves=True))


def say(folder: RunFolder, text: str, rank: int = 0, at: float | None = None, attempt: int = 1) -> None:
    """Have a rank print ``text``, at a time that its log remembers."""
    log = folder.log(attempt, rank)
    with log.open("a", newline="") as file:
        file.write(text)
    if at is not None:
        os.utime(log, (at, at))


def known(folder: RunFolder, *names: str, rank: int = 0) -> list[tuple[object, ...]]:
    return [tuple(record.get(name) for name in names) for record in read_records(folder.metrics(rank))]


def test_printed_fields_are_those_of_the_records(folder: RunFolder) -> None:
    watched = watch(folder)
    colored = "\x1b[32mstep 1,024: loss 1.5e-3, 125.5 ms\x1b[0m"
    say(folder, f"hello\nstep 1: loss 2.5, 250 ms\n{colored}\nstep 1025: loss nan, 1 ms\n")
    watched.poll()
    assert known(folder, "step", "attempt", "step_time_s")[:2] == [(1, 1, 0.25), (1024, 1, 0.1255)]
    losses = [record["loss"] for record in read_records(folder.metrics(0))]
    assert losses[:2] == [2.5, 0.0015] and losses[2] != losses[2]
    assert "step_time_ms" not in folder.metrics(0).read_text()
    watched.close()
    assert names(folder) == []


def test_steps_of_an_epoch_are_steps_of_the_run(folder: RunFolder) -> None:
    pattern = r"Epoch: \[(?P<epoch>\d+)\]\[\s*(?P<step>\d+)/(?P<steps_per_epoch>\d+)\]"
    watched = watch(folder, pattern)
    say(folder, "Epoch: [0][  2/1000]\nEpoch: [0][1000/1000]\nEpoch: [1][1/1000]\nEpoch: [2][ 7/1000]\n")
    watched.poll()
    assert known(folder, "step", "epoch", "steps_per_epoch") == [(step, None, None) for step in (2, 1000, 1001, 2007)]


def test_an_epoch_in_a_line_of_its_own_is_that_of_the_lines_after_it(folder: RunFolder) -> None:
    watched = watch(folder, r"epoch (?P<epoch_from_1>\d+)|(?P<step>\d+)/(?P<steps_per_epoch>\d+)( loss=(?P<loss>\S+))?")
    say(folder, "epoch 1\n1/24 loss=3\n24/24 loss=2\nepoch 2\n")
    watched.poll()
    say(folder, "1/24\n24/24 loss=1\n")
    watched.poll()
    assert known(folder, "step", "loss") == [(1, 3), (24, 2), (25, None), (48, 1)]


def test_figures_of_a_mapping_over_several_lines_are_those_of_its_step(folder: RunFolder) -> None:
    watched = watch(folder, r"(?P<begin>^\{)?'(?:loss': (?P<loss>[\d.]+)|step': (?P<step>\d+))")
    say(folder, "{'loss': 2.5,\n 'other': 1,\n 'step': 1}\n{'loss': 2.0,\n")
    watched.poll()
    say(folder, " 'step': 2}\n 'step': 3\n 'loss': 1.5\n")
    watched.close()
    assert known(folder, "step", "loss") == [(1, 2.5), (2, 2.0), (3, 1.5)]


PRINTED = {
    "accelerate": (" 31%|███▏      | 40/128 [00:03<00:06, 13.09it/s]", {"step": 40, "steps": 128}),
    "nanogpt": ("iter 6: loss 2.6927, time 8.07ms, mfu 0.01%", {"step": 6, "loss": 2.6927, "step_time_s": 0.00807}),
    "llama2c": (
        "6 | loss 6.1392 | lr 3.000000e-06 | 43.29ms | mfu 0.00%",
        {"step": 6, "loss": 6.1392, "lr": 3e-6, "step_time_s": 0.04329},
    ),
    "imagenet": (
        "Epoch: [1][2/3]\tTime  2.986 ( 3.289)\tData  0.112 ( 0.068)\tLoss 5.2117e+00 (5.6042e+00)\tAcc@1  12.50",
        {"step": 5, "loss": 5.2117, "step_time_s": 2.986},
    ),
    "timm": (
        "Train: 1 [   4/6 ( 83%)]  Loss: 1.07 (1.25)  Time: 0.184s,   86.75/s  (0.413s,   38.71/s)  LR: 6.250e-03 ",
        {"step": 10, "loss": 1.07, "step_time_s": 0.184, "lr": 6.25e-3},
    ),
    "openclip": (
        "2026-11-27,06:31:23 | INFO | open_clip_train.train | Train Epoch: 1 [40/64 (62%)] Data (t): 0.088 Batch (t):"
        " 9.557, 0.837114/s, 0.837114/s/gpu LR: 0.000489 Logit Scale: 14.286 Contrastive_loss: 2.0794 (2.0794)"
        " Loss: 2.0795 (2.0794)",
        {"step": 104, "loss": 2.0795, "samples_per_s": 0.837114, "lr": 0.000489},
    ),
    "lightning": ("Epoch 2: 100%|█████| 6/6 [00:21<00:00,  0.27it/s, train_acc1=0.250, val_acc1=0.250]", {"step": 18}),
    "torchtune": ("4|256|Loss: 4.1257: 100%|██████| 64/64 [00:02<00:00, 29.73it/s]", {"step": 256, "loss": 4.1257}),
    "ignite": (
        "Epoch 2 - loss: 0.8123 - lr: 0.0050:  47%|████▋     | 30/64 [00:03<00:03,  9.71it/s]",
        {"step": 94, "loss": 0.8123, "lr": 0.005},
    ),
    "mmengine": (
        "11/27 12:51:36 - mmengine - INFO - Epoch(train) [3][2/6]  lr: 1.0000e-01  eta: 0:00:02  time: 0.6606"
        "  data_time: 0.0258  loss: 0.0404",
        {"step": 14, "lr": 0.1, "loss": 0.0404},
    ),
    "nanochat": (
        "step 00021/00040 (52.50%) | loss: 6.205037 | lrm: 0.55 | dt: 16.85ms | tok/sec: 30,389 | bf16_mfu: 0.00",
        {"step": 21, "loss": 6.205037, "step_time_s": 0.01685, "tokens_per_s": 30389},
    ),
    "yolov5": (
        "        1/2         0G     0.1192    0.01123    0.04482         32         64: 66% ━━━━━━━━──── 4/6 1.1it/s",
        {"step": 10, "loss": 0.1192},
    ),
    "easylm": (
        "{'accuracy': array(0.048, dtype=float32),\n 'gradient_norm': array(0.3119841, dtype=float32),\n"
        " 'learning_rate': array(0.01, dtype=float32),\n 'loss': array(4.8694286, dtype=float32),\n 'step': 125}",
        {"step": 125, "loss": 4.8694286, "lr": 0.01, "grad_norm": 0.3119841},
    ),
    "mace": (
        "2026-11-27 12:32:50.638 INFO: Epoch 5: head: Default, loss=0.00454662, RMSE_E_per_atom=    6.45 meV, RMSE_F= ",
        {"step": 5, "loss": 0.00454662},
    ),
    "sockeye": (
        "[INFO:sockeye.training] E=3 B=200\ts/sec=197.90 tok/sec=3166.39 u/sec=12.37\tppl=410.166298 ",
        {"step": 200, "loss": 6.016563},
    ),
    "speechbrain": (
        " 88%|████████▊ | 21/24 [00:00<00:00, 27.04it/s, train_loss=0.0842]",
        {"step": 21, "loss": 0.0842},
    ),
    "litgpt": (
        "Epoch 1 | iter 128 step 64 | loss train: 5.917, val: n/a | iter time: 84.21 ms (step) remaining time: 0:00:12",
        {"step": 64, "loss": 5.917, "step_time_s": 0.08421},
    ),
    "diffusers": (
        "Epoch 3:  71%|███████   | 17/24 [00:02<00:00,  7.15it/s, loss=0.976, lr=1.78e-5, step=89]",
        {"step": 89, "loss": 0.976, "lr": 1.78e-5},
    ),
    "trainer": (
        " 68%|██████▊   | 41/60 [00:00<00:00, 48.93it/s]\n"
        "{'loss': '10.57', 'grad_norm': '1.969', 'learning_rate': '1.667e-05', 'epoch': '0.1085'}",
        {"step": 41, "steps": 60, "loss": 10.57, "grad_norm": 1.969, "lr": 1.667e-5},
    ),
}
"""Preset -> the lines of a step as its program prints them, and their fields."""


def test_presets_read_the_lines_of_their_programs() -> None:
    presets = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / "like").glob("*.yaml")}
    assert {name for name, preset in presets.items() if preset["progress"]} == PRINTED.keys()
    for name, (lines, fields) in PRINTED.items():
        read: dict[str, float] = {}
        for line in lines.splitlines():
            found = re.search(presets[name]["progress"], line)
            assert found is not None, (name, line)
            read |= progress.numbers(found.groupdict())
        assert read == pytest.approx(fields), name


BAR = r"(?P<step>\d+)/(?P<steps>\d+) \[|^\{'loss': '?(?P<loss>[\d.]+)"


def test_a_line_without_a_step_is_about_the_last_step(folder: RunFolder) -> None:
    watched = Progress(folder, 1, (0,), RankContract(progress=BAR, writes_curves=True))
    start = time.time() + 1000
    with pytest.MonkeyPatch.context() as patched:
        for at, text in (
            (start, "{'loss': 9.0}\n  0/60 [\r  1/60 [\r{'loss': 3.5}\n  1/60 [\r"),
            (start + 2.0, "  2/60 [\r"),
            (start + 2.5, "{'loss': '3.0'}\n  2/60 [\r"),
            (start + 3.0, "  1/8 [\r  8/8 [\r"),  # the bar of an evaluation
            (start + 4.0, "  3/60 [\r  4/60 [\r{'loss': 2.5}\n"),
        ):
            patched.setattr(progress.time, "time", lambda at=at: at + 0.25)
            say(folder, text, at=at)
            watched.poll()
    watched.close()
    records = [(1, 3.5, None), (2, 3.0, 2.0), (3, None, 1.0), (4, 2.5, 1.0)]
    assert known(folder, "step", "loss", "step_time_s") == records
    assert scalars(folder.tensorboard, "train/loss") == {1: 3.5, 2: 3.0, 4: 2.5}
    # The step with a later loss has two records, as a step that is saved; a bar that is only drawn again has one.
    assert len(folder.metrics(0).read_text().splitlines()) == len(records) + 1


def test_half_a_line_waits_for_its_end_which_may_be_a_carriage_return(folder: RunFolder) -> None:
    watched = watch(folder)
    for text, steps in (("step 1: lo", 0), ("ss 2.5\rstep 2: loss 2.", 1), ("25", 1), ("\n", 2), ("step 3: loss 9", 2)):
        say(folder, text)
        watched.poll()
        assert len(known(folder, "step")) == steps
    watched.close()
    assert known(folder, "step", "loss") == [(1, 2.5), (2, 2.25)]


def test_times_between_lines_are_spread_over_their_steps(folder: RunFolder) -> None:
    watched = watch(folder)
    start = time.time() + 1000  # as if each poll were at the time of the file
    with pytest.MonkeyPatch.context() as patched:
        for at, text in (
            (start, "step 10: loss 3\n"),
            (start + 5.0, "step 20: loss 2\n"),
            (start + 9.0, "step 30: loss 2\nstep 40: loss 1\n"),
        ):
            patched.setattr(progress.time, "time", lambda at=at: at + 0.25)
            say(folder, text, at=at)
            watched.poll()
    # 5 s over 10 steps; then 4 s over 20, half of them after the first line.
    assert known(folder, "step", "step_time_s") == [
        (10, None),
        (20, pytest.approx(0.5)),
        (30, pytest.approx(0.2)),
        (40, pytest.approx(0.2)),
    ]
    records = read_records(folder.metrics(0))
    assert [record["time"] - start for record in records] == pytest.approx([0, 5, 7, 9])
    # Of the two lines of one reading only the mean over its 4 s is known; a line alone has its own time.
    marks = [record.get(progress.RESOLUTION) for record in records]
    assert marks == [None, None, pytest.approx(4.0), pytest.approx(4.0)]


def test_stated_work_gives_rank_0_a_throughput(folder: RunFolder) -> None:
    watched = Progress(folder, 1, (0, 1), RankContract(progress=PATTERN, unit="samples", work_per_step=512))
    for rank in (0, 1):
        say(folder, "step 1: loss 2, 250 ms\n", rank)
    watched.poll()
    assert known(folder, "samples_per_s") == [(2048.0,)]
    assert known(folder, "samples_per_s", rank=1) == [(None,)]


def test_a_pattern_that_never_matches_is_said_at_the_end(folder: RunFolder) -> None:
    watched = watch(folder, "iter (?P<step>[0-9]+)", (0, 1))
    say(folder, "step 1\n")
    watched.poll()
    assert names(folder) == []
    watched.close()
    [event] = folder.read_events()
    assert (event["event"], event["attempt"]) == ("progress_not_matched", 1)
    assert event["pattern"] == "iter (?P<step>[0-9]+)" and "script.progress" in event["cause"]


def test_a_node_whose_ranks_do_not_print_says_nothing(folder: RunFolder) -> None:
    other = watch(folder, PATTERN, (2, 3))
    say(folder, "ready\n", 2)
    other.close()
    assert names(folder) == []
    first = watch(folder, PATTERN, (0, 1))  # the last rank prints, elsewhere
    append_json_lines(folder.metrics(3), [{"step": 1, "attempt": 1, "time": 1.0}])
    first.close()
    assert names(folder) == []


def test_a_pattern_that_would_take_years_is_given_up(folder: RunFolder) -> None:
    say(folder, f"1 {'a' * 40}b\n2 a\n")
    code = (
        "import sys; from launch.runs.progress import Progress; from launch.runs.folder import RunFolder\n"
        "from launch.workload import RankContract\n"
        "pattern = r'(?P<step>[0-9]+) (a+)+$'\n"
        "watched = Progress(RunFolder(sys.argv[1]), 1, (0,), RankContract(progress=pattern))\n"
        "watched.poll(); watched.close()"
    )
    # In the main thread of a process, as in an agent: only there do signals interrupt.
    python(code, folder.path, cwd=folder.path)
    assert names(folder)[0] == "progress_too_slow" and not folder.metrics(0).exists()


def test_a_look_is_bounded_and_of_a_long_line_the_beginning_is_searched(folder: RunFolder) -> None:
    watched = watch(folder)
    say(folder, f"step 1: loss 2 {'x' * 500_000}\n{'x' * 500_000} step 9: loss 1\n")
    say(folder, "".join(f"step {step}: loss 2, 1 ms {'.' * 80}\n" for step in range(10, 10_001)))
    watched.poll()
    assert known(folder, "step") == []
    watched.close()
    assert known(folder, "step") == [(1,), *((step,) for step in range(10, 10_001))]


def test_curves_of_a_new_attempt_replace_what_was_lost(folder: RunFolder) -> None:
    first = watch(folder)
    say(folder, "step 1: loss 3, 10 ms\nstep 2: loss 2, 10 ms\nstep 3: loss 1, 10 ms\n")
    first.poll()
    first.close()
    assert scalars(folder.tensorboard, "train/loss") == {1: 3, 2: 2, 3: 1}
    time.sleep(1.1)  # event files are read in the order of the seconds in their names
    second = watch(folder, attempt=2)
    say(folder, "step 3: loss 5, 10 ms\nstep 4: loss 4, 10 ms\n", attempt=2)
    second.poll()
    second.close()
    assert scalars(folder.tensorboard, "train/loss") == {1: 3, 2: 2, 3: 5, 4: 4}


def test_curves_of_a_rank_that_records_by_itself(folder: RunFolder) -> None:
    append_json_lines(folder.metrics(0), [{"step": 1, "attempt": 1, "loss": 9.0, "time": 1.0}])
    watched = watch(folder, pattern=None, attempt=2)
    own = {"attempt": 2, "accuracy": 0.5, "samples": 8, "time": 2.0}
    append_json_lines(folder.metrics(0), [{"step": step, "loss": 1.0 / step, **own} for step in (1, 2)])
    watched.poll()
    watched.close()
    tags = read_events(folder.tensorboard).Tags()["scalars"]
    found = {tag: scalars(folder.tensorboard, tag) for tag in tags}
    assert found == {"train/loss": {1: 1.0, 2: 0.5}, "train/accuracy": {1: 0.5, 2: 0.5}}
    assert names(folder) == []
