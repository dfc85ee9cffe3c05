"""Labels of points in tables and notes: what sets a point apart, which its folder's name may not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launch.report import build
from launch.runs.find import point_labels
from launch.runs.overrides import point_name

STEADY = [1.0] * 10


def test_points_are_shown_by_what_sets_them_apart(tmp_path: Path, make_run: Any) -> None:
    shared = ("optim.max_steps=12", "name=t", "data.max_bytes=200000")
    for nodes, strategy in ((1, "ddp"), (1, "ds_zero0"), (2, "ddp"), (2, "ds_zero0")):
        words = (f"nodes={nodes}", f"parallel={strategy}", *shared)
        make_run(tmp_path / f"cut-{nodes}{strategy}", nodes, nodes, words, strategy=strategy).attempt().steps(
            1, STEADY
        ).event("finished")
    table = build(tmp_path)
    assert {row.point: row.label for row in table.rows} == {
        f"cut-{nodes}{strategy}": f"nodes={nodes},parallel={strategy}"
        for nodes in (1, 2)
        for strategy in ("ddp", "ds_zero0")
    }
    assert {row.topology for row in table.rows if row.nodes == 2} == {
        "ddp dp_replicate=2",
        "deepspeed_zero0 dp_replicate=2",
    }
    assert not any("cut-" in note for note in table.notes)


def test_points_that_nothing_sets_apart_keep_their_names(tmp_path: Path, make_run: Any) -> None:
    for name, words in (("a", ("nodes=1",)), ("b", ("nodes=1", "output_dir=elsewhere"))):
        make_run(tmp_path / name, overrides=words).attempt().steps(1, STEADY)
    assert [row.label for row in build(tmp_path).rows] == ["a", "b"]
    assert [row.label for row in build(tmp_path / "a").rows] == ["a"]


def test_a_label_keeps_its_generation_and_a_folder_that_was_typed_its_name() -> None:
    runs = [("a-1", ["nodes=1", "seed=2", "cluster.partition=x"]), ("a-1~2", ["seed=2", "nodes=1", "fresh=true"])]
    runs += [("b", ["seed=2", "nodes=2"]), ("here", ["seed=2", "nodes=4", "run_dir=/elsewhere/here"])]
    assert point_labels([(Path("s", name), typed) for name, typed in runs]) == [
        "nodes=1",
        "nodes=1~2",
        "nodes=2",
        "here",
    ]
    assert point_labels([(Path("s/one"), ["nodes=1"])]) == ["one"]


def test_a_run_alone_whose_folder_says_nothing_is_called_by_its_name() -> None:
    assert point_labels([(Path("outputs/quick_test/default"), ["cluster=local"])]) == ["quick_test"]
    assert point_labels([(Path("outputs/quick_test/default~2"), ["fresh=true"])]) == ["quick_test~2"]
    assert point_labels([(Path("mine/default"), ["run_dir=mine/default"])]) == ["default"]
    typed = ["nodes=1", f"script.args={'a' * 200}"]
    cut = point_name(typed, ())
    assert point_labels([(Path("outputs/mine", cut), typed)]) == ["mine"]
    assert point_labels([(Path("outputs/mine", f"{cut}~2"), typed)]) == ["mine~2"]
    assert point_labels([(Path("elsewhere", cut), [*typed, f"run_dir=elsewhere/{cut}"])]) == [cut]
    beside = [(Path("outputs/quick_test/default"), []), (Path("outputs/quick_test/nodes=2"), ["nodes=2"])]
    assert point_labels(beside) == ["default", "nodes=2"]


@given(st.lists(st.tuples(st.sampled_from(["nodes=1", "nodes=2", "fresh=true"]), st.sampled_from("ab")), max_size=6))
def test_labels_always_differ(drawn: list[tuple[str, str]]) -> None:
    runs = [(Path(f"{text}~{index + 1}"), [text, f"seed={seed}"]) for index, (text, seed) in enumerate(drawn)]
    assert len(set(point_labels(runs))) == len(runs)
