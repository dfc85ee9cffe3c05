"""benchmarks.gpu without a GPU: says so, rehearses its lists on the CPU, and keeps to its time and its memory."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import contestant
from benchmarks.gpu.groups import Entry, Group, Machine, changes, engines, groups, models, packs, planned
from benchmarks.turns import Contestant, opened, ratio, take_turns
from tests.support.commands import ROOT, run
from tests.support.planning import refused

H100 = Machine("cuda", 1, 79.6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    assert run("benchmarks.gpu", cwd=ROOT, status=2).count("\n") == 1


def test_the_models_fit_one_h100_by_their_plans_and_a_smaller_gpu_with_a_smaller_batch() -> None:
    on_h100 = [planned(H100, entry) for entry in models(H100)]
    assert [entry.micro_batch for entry in on_h100] == [32, 8, 16]
    assert all(10 < entry.planned_gib < H100.room_gib for entry in on_h100)
    small = replace(H100, memory_gib=16.0)
    gpt2, llama, moe = models(small)
    assert planned(small, gpt2).micro_batch == 16 and planned(small, moe).micro_batch == 2
    refused(planned, small, llama, said="llama_1p36b, of which one sequence takes")


def test_every_engine_that_fits_the_gpus_is_watched() -> None:
    assert [entry.name for entry in engines(H100)][:3] == ["ddp", "zero1", "fsdp"]
    four = {entry.name for entry in engines(replace(H100, ranks=4))}
    assert {"hsdp", "tp", "fsdp_tp", "pp", "pp_fsdp", "cp", "fsdp_cp", "ep", "fsdp_ep"} <= four


def test_each_change_has_overrides_that_go_together() -> None:
    entries = [planned(H100, entry) for group in groups(H100, True) for entry in group.entries]
    assert {"nanoGPT", "transformers", "compile=none", "the host waits for each step"} <= {e.name for e in entries}
    assert sum(entry.planned_gib > 0 for entry in entries) == len(entries)
    assert next(changes(H100)).words == next(entry for entry in changes(H100) if entry.without).words


def test_a_pack_fits_the_memory_and_begins_with_the_first_where_all_are_compared_with_it() -> None:
    entries = tuple(Entry(name, planned_gib=gib) for name, gib in zip("abcde", (20, 30, 25, 10, 10), strict=True))
    names = [[entry.name for entry in pack] for pack in packs(Group("x", entries), H100, 7)]
    assert names == [["a", "b"], ["a", "c", "d", "e"]]
    names = [[entry.name for entry in pack] for pack in packs(Group("x", entries, compares=False), H100, 2)]
    assert names == [["a", "b"], ["c", "d"], ["e"]]


ANSWERS = """
import sys
print('{"ready": 1}', flush=True)
for line in sys.stdin:
    if line.strip() == "9":
        sys.exit()
    print('{"wall": %s, "cpu": 1}' % line.strip() if line.strip().isdigit() else '{"failure": "lost"}', flush=True)
"""


def test_contestants_are_asked_in_another_order_in_each_round_and_one_that_fails_stays_away() -> None:
    asked: list[str] = []

    def steps(one: Contestant) -> int:
        asked.append(one.name)
        return 9 if one.name == "b" and asked.count("b") == 2 else 3

    command = [sys.executable, "-c", ANSWERS]
    with opened("a", command, {}) as a, opened("b", command, {}) as b:
        assert a.answer(60) == b.answer(60) == {"ready": 1}
        take_turns([a, b], 3, steps, lambda: 60.0)
        assert asked == ["a", "b", "b", "a", "a"] and (a.wall, b.wall) == ([3, 3, 3], [3])
        assert b.failure == "ended without a word" and not a.failure
        assert a.ask("waits", 60) == {} and a.failure == "lost"
        take_turns([a], 3, steps, lambda: 0.0)
        assert asked.count("a") == 3
    assert a.process.poll() is not None


def test_one_that_says_nothing_is_given_up() -> None:
    with opened("silent", [sys.executable, "-c", "import sys; sys.stdin.read()"], {}) as silent:
        assert silent.answer(0.1) == {} and "no answer within" in silent.failure


def test_waits_are_told_by_place_and_looked_for_in_the_strict_mode_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch does on a GPU: a warning from the line that waits, or in the mode ``error`` an exception."""
    modes: list[str] = []

    def waiting() -> None:
        if modes[-1] == "error":
            raise RuntimeError(contestant.WAITS)
        warnings.warn(contestant.WAITS, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    at = f"tests/test_gpu_script.py:{waiting.__code__.co_firstlineno + 3}"
    assert contestant.waits(waiting) == {"waits": {at: contestant.WATCHED}} and modes == ["warn", "default"]
    assert contestant.waits(lambda: None) == {"waits": {}} and modes[2:] == ["warn", "error", "default"]
    told = contestant.waits(lambda: waiting() if modes[-1] == "error" else None)["waits"]
    assert list(told) == [f"tests/test_gpu_script.py:{waiting.__code__.co_firstlineno + 2}: {contestant.WAITS}"]
    assert modes[-1] == "default"


def test_a_ratio_is_of_turns_of_the_same_round() -> None:
    # In the third round the machine was ten times slower for both.
    assert ratio([2.0, 2.2, 20.0], [1.0, 1.0, 10.0]) == 2.0


def test_the_lists_are_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    words = ("--device=cpu", "--only=models,peers", "--ranks=2", "--rounds=1", "--budget-s=600", f"--to={tmp_path}")
    told = run("benchmarks.gpu", *words, cwd=ROOT)
    found = json.loads((tmp_path / "gpu.json").read_text())
    names = ["gpt2_124m", "llama_1p36b", "moe_200m", "ours", "transformers"]
    assert [row["entry"]["name"] for row in found["rows"]] == names
    assert {row["outcome"] for row in found["rows"]} == {"ok"} and found["rates"]["fp32"] > 1e9
    assert all(row["step_s"] > 0 and row["peak_gib"] > 0 for row in found["rows"])
    assert [row["told"]["ranks"] for row in found["rows"]] == [2, 2, 2, 1, 1] and found["rows"][4]["ratio"] > 0
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in page and f"| {name} |" in told for name in names)
    assert torch.__version__ in page and "no time was left" not in page


def test_what_there_was_no_time_for_is_told(tmp_path: Path) -> None:
    told = run(f"benchmarks.gpu --device=cpu --only=experts --budget-s=0 --to={tmp_path}", cwd=ROOT)
    assert told.count("no time was left") == 3 and (tmp_path / "gpu.md").is_file()
