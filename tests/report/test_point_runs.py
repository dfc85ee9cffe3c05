"""Runs of single points in TensorBoard: a row of the HParams tab, the heat map of the ranks, curves of the GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from launch.report import build, write
from launch.runs.environment import GpuSample, append_samples
from launch.runs.files import ReportFile
from launch.runs.tensorboard import png_shape

TENSORBOARD = [ReportFile.tensorboard]
GPU = "0000:3b:00.0"


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def scalars(found: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_points_of_a_sweep_are_rows_of_the_hparams_tab(tmp_path: Path, make_run: Any) -> None:
    for nodes, time_s in ((1, 1.0), (2, 0.625)):
        words = (f"nodes={nodes}", "optim.lr=0.003", "compile=true", "+parallel=fsdp", "cluster.partition=a100")
        builder = make_run(tmp_path / f"p{nodes}", nodes, nodes, words)
        builder.attempt().steps(1, [time_s] * 12).event("finished", attempt=1)
    for _ in range(2):  # a report that is made again has no point twice
        write(build(tmp_path), files=TENSORBOARD)
    for nodes, rate, efficiency in ((1, 2048, 1.0), (2, 3276.8, 0.8)):
        found = read(tmp_path / "Scaling" / "points" / f"nodes={nodes}")
        content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        start = metadata.parse_session_start_info_plugin_data(content)
        told = {name: json_format.MessageToDict(value) for name, value in start.hparams.items()}
        # Where it was submitted does not make a point what it is.
        assert told == {"nodes": nodes, "optim.lr": 0.003, "compile": True, "parallel": "fsdp", "ranks": nodes}
        assert scalars(found) == {
            "point/tokens_per_s": [(12, pytest.approx(rate))],
            "point/efficiency": [(12, pytest.approx(efficiency))],
            "point/loss": [(12, pytest.approx(0.5))],
            "point/step_time_s": [(12, pytest.approx(2048 / rate))],
        }
        images = found.Images("point/ranks over the run") if found.Tags()["images"] else []
        assert len(images) == nodes - 1, "a rank alone is compared with none"
        assert all(png_shape(image.encoded_image_string)[0] > 800 for image in images)


def test_gpus_of_a_point_have_curves_over_the_run_and_a_table(tmp_path: Path, make_run: Any) -> None:
    for nodes in (1, 2):
        run = make_run(tmp_path / f"p{nodes}", nodes, nodes, (f"nodes={nodes}",)).attempt().steps(1, [1.0] * 12).run
    for node in (0, 1):
        told = [{"power_w": 100.0 * (node + 1), "throttle_reasons": 4 * node * at} for at in (0, 1)]
        append_samples(
            run, node, [GpuSample(1e9 + 5 * at, 1, f"n{node}", {GPU: told[at]}) for at in (0, 1)]
        )  # fmt: skip
    write(build(tmp_path), files=TENSORBOARD)
    sampled = tmp_path / "Scaling" / "gpus"
    found = read(sampled / "nodes=2")
    expected = {"gpu/power_w": [(0, 150.0), (5, 150.0)], "gpu/throttled": [(0, 0.0), (5, 0.5)]}
    assert scalars(found) == expected and [path.name for path in sampled.iterdir()] == ["nodes=2"]
    assert [point.wall_time for point in found.Scalars("gpu/power_w")] == [1e9, 1e9 + 5]
    assert b"| n1 | 1 |" in found.Tensors("gpu/hosts")[0].tensor_proto.string_val[0]
    write(build(tmp_path / "p2"), files=TENSORBOARD)
    assert scalars(read(tmp_path / "p2" / "Summary")) == expected
