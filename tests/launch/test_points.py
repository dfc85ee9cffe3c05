"""The folder of a point follows from what was typed, and from nothing else."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from gpt.config import TrainConfig
from gpt.workload import GptWorkload
from launch.config.compose import not_in_point
from launch.runs.compose import choose_folder
from launch.runs.overrides import point_name

NOT_IN_POINT = not_in_point(GptWorkload())
WORDS = st.lists(
    st.tuples(st.sampled_from(["nodes", "model", "optim.lr", "data.path", "seed"]), st.text(min_size=1, max_size=300)),
    max_size=5,
    unique_by=lambda pair: pair[0],
).map(lambda pairs: [f"{key}={value}" for key, value in pairs])


@given(words=WORDS, data=st.data())
def test_order_does_not_matter_and_the_name_is_a_folder(words: list[str], data: st.DataObject) -> None:
    name = point_name(words, NOT_IN_POINT)
    assert point_name(data.draw(st.permutations(words)), NOT_IN_POINT) == name
    assert "/" not in name and "\0" not in name and name not in (".", "..")
    assert len(name.encode()) <= 255


@given(one=WORDS, other=WORDS)
def test_other_words_give_another_name(one: list[str], other: list[str]) -> None:
    same = sorted(one) == sorted(other)
    assert (point_name(one, NOT_IN_POINT) == point_name(other, NOT_IN_POINT)) == same


def test_where_and_how_a_run_is_submitted_does_not_name_it() -> None:
    words = ["cluster=slurm", "cluster.partition=gpu", "name=x", "output_dir=/y", "fresh=true", "nodes=2"]
    assert point_name(words, NOT_IN_POINT) == "nodes=2"
    assert point_name([], NOT_IN_POINT) == "default"


def test_fresh_makes_a_new_folder_and_the_same_command_then_goes_on_in_it(tmp_path: Path) -> None:
    config = TrainConfig(name="n", output_dir=str(tmp_path))

    def choose(fresh: bool) -> str:
        config.fresh = fresh
        folder = choose_folder(config, ["nodes=2"], NOT_IN_POINT)
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder.point

    assert [choose(f) for f in (False, False, True, False, True, False)] == [
        "nodes=2",
        "nodes=2",
        "nodes=2~2",
        "nodes=2~2",
        "nodes=2~3",
        "nodes=2~3",
    ]
