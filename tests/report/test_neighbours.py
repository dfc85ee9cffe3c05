"""Points that ran side by side on one machine measured each other: no efficiency is claimed for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.report import build


@pytest.mark.parametrize(
    ("cores", "start", "machines", "crowded"),
    [
        (2, 50.0, 1, True),  # 1 + 2 threads at the same time on 2 cores
        (2, 100.0, 1, False),  # one after the other
        (4, 50.0, 1, False),  # cores enough for both
    ],
)
def test_two_points_on_one_machine(cores: int, start: float, machines: int, crowded: bool, make_run, tmp_path: Path):
    for nodes, first in ((1, 0.0), (2, start)):
        builder = make_run(
            tmp_path / f"nodes={nodes}", nodes, nodes, (f"nodes={nodes}",), cores=cores, machines=machines
        )
        builder.attempt().steps(1, [1.0] * 5, time=first).steps(6, [1.0] * 6, time=first + 99.0)
    table = build(tmp_path)
    assert [row.oversubscribed for row in table.rows] == [crowded, crowded]
    assert [row.efficiency is None for row in table.rows] == [crowded, crowded]
    assert any("at the same time as nodes=2" in note for note in table.notes) == crowded


def test_two_points_on_different_machines(make_run, tmp_path: Path):
    for nodes, machine in ((1, "one"), (2, "other")):
        place = {"machine": machine}
        builder = make_run(tmp_path / f"nodes={nodes}", nodes, nodes, (f"nodes={nodes}",), cores=2, extra_rank=place)
        builder.attempt().steps(1, [1.0] * 5, time=0.0).steps(6, [1.0] * 6, time=99.0)
    assert [row.oversubscribed for row in build(tmp_path).rows] == [False, False]


def test_a_point_that_starts_beside_another_disturbs_it(make_run, tmp_path: Path):
    """Ranks that import libraries take a core each, long before their first step."""
    for nodes, begun, first in ((1, 0.0, 10.0), (2, 50.0, 200.0)):
        builder = make_run(tmp_path / f"nodes={nodes}", nodes, nodes, (f"nodes={nodes}",), cores=2)
        builder.attempt().steps(1, [1.0] * 5, time=first).steps(6, [1.0] * 6, time=first + 99.0)
        builder.event("agent_started", time=begun).event("agent_ended", time=first + 110.0)
    first_row, second_row = build(tmp_path).rows
    assert (first_row.oversubscribed, second_row.oversubscribed) == (True, False)
