"""benchmarks/peers.py with a tiny model: who is compared, in which figures, and who is left out."""

from __future__ import annotations

import re

from benchmarks.peers import Setting, Shape, contestants, parse, ratio
from tests.support.commands import ROOT, run

TINY = ("--layers=1", "--width=32", "--heads=2", "--block=16", "--vocab=256", "--batch=2")


def test_a_library_that_was_not_given_is_left_out() -> None:
    assert contestants("gpt2", parse([])) == ["ours", "transformers"]
    assert contestants("gpt2", parse(["--nanogpt", ".", "--litgpt", "."])) == ["ours", "nanoGPT", "transformers"]
    assert contestants("llama", parse(["--nanogpt", ".", "--litgpt", "."])) == ["ours", "transformers", "litgpt"]


def test_adamw_is_fused_where_a_peers_own_script_fuses_it_or_everywhere() -> None:
    setting = Setting(Shape("gpt2"), "eager", 1, fused=False, device="cpu")
    assert [setting.fuses(name) for name in ("nanoGPT", "transformers", "litgpt")] == [False, True, False]
    assert Setting(Shape("gpt2"), "eager", 1, fused=True, device="cpu").fuses("nanoGPT")
    assert Setting(Shape("gpt2"), "eager", 1, fused=False, device="cuda").fuses("litgpt")


def test_a_ratio_is_of_turns_of_the_same_round() -> None:
    # In the third round the machine was ten times slower for both.
    assert ratio([2.0, 2.2, 20.0], [1.0, 1.0, 10.0]) == 2.0


def test_contestants_take_turns_and_the_table_says_who_was_missing() -> None:
    words = ("--shapes=llama", "--modes=eager", "--threads=1", "--rounds=2", *TINY)
    told = run("benchmarks.peers", *words, cwd=ROOT)
    rows = [line.split(" | ") for line in told.splitlines() if line.startswith("| llama")]
    assert [row[3] for row in rows] == ["ours", "transformers, fused AdamW"]
    assert all(float(cell) > 0 for row in rows for cell in row[4:7])
    assert float(rows[1][7]) > 0 and float(rows[1][8].strip(" |")) > 0
    assert "nanoGPT was not given; litgpt was not given" in told
    assert re.search(r"layers 1, width 32.*load average", told)
