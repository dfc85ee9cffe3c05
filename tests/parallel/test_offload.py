"""Offloaded state learns the same, and is not counted on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from gpt.config import TrainConfig
from gpt.planning.memory import per_rank
from gpt.topology import split_batch
from gpt.topology.rules import check_parallel_dims
from gpt.training.checkpoints import save
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, TINY, learn, start, step

WORDS = [*MODELS["untied, grouped queries"], "optim.max_micro_batch=2"]


def offloaded(run: Any) -> bool:
    """Tell whether fsdp was told to keep every parameter of a run on the host."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in run.engine.module.modules() if isinstance(m, FSDPModule)]
    return all(p.offload_to_cpu for group in groups if group is not None for p in group.fsdp_params)


def learn_both(rank: int, size: int, folder: Path) -> dict[str, Any]:
    plain = start(rank, size, folder / "plain", "parallel=fsdp", *WORDS)
    host = start(rank, size, folder / "host", "parallel=fsdp_offload", *WORDS)
    found = {"offloaded": (offloaded(plain), offloaded(host)), "plain": learn(plain), "host": learn(host)}
    save(host)
    to_come = [step(host) for _ in range(2)]
    for way in ("fsdp", "fsdp_offload"):
        again = start(rank, size, folder / "host", f"parallel={way}", *WORDS)
        assert again.step == host.step - 2
        found[way] = ([step(again) for _ in range(2)], to_come)
    return found


def test_offloading_changes_no_bit_and_checkpoints_cross(tmp_path: Path) -> None:
    found = run_distributed(learn_both, 2, tmp_path / "runs")[0]
    assert found["offloaded"] == (False, True)
    for what in ("losses", "norms"):
        assert found["host"][what] == found["plain"][what]
    for what in ("gradients", "weights"):
        for name, tensor in found["plain"][what].items():
            assert torch.equal(found["host"][what][name], tensor), f"{what} of {name}"
    for way in ("fsdp", "fsdp_offload"):
        steps, to_come = found[way]
        assert steps == to_come


def composed(*words: str) -> TrainConfig:
    config = config_from([*TINY, *words])
    config.validate()
    return config


def test_what_is_on_the_host_is_not_planned_on_the_device() -> None:
    plain, host = (
        per_rank(config, dims := check_parallel_dims(config, 2), split_batch(config.optim, dims.data_ranks))
        for config in (composed("parallel=fsdp"), composed("parallel=fsdp_offload"))
    )
    assert plain.host == 0
    assert host.host == plain.parameters + plain.gradients + plain.optimizer > 0
    assert host.total + host.host == plain.total


@pytest.mark.parametrize(
    ("words", "ranks", "found"),
    [
        (["parallel=ddp", "parallel.cpu_offload=true"], 2, "parallel.cpu_offload=true with parallel.strategy=ddp"),
        (
            ["parallel=pp_fsdp", "parallel.cpu_offload=true", "parallel.pp=2", "model.tie_embeddings=true"],
            4,
            "parallel.cpu_offload=true with parallel.pp=2",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_refused_and_the_fix_is_accepted(words: list[str], ranks: int, found: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_parallel_dims(composed(*words), ranks)
    assert found in refused.value.found
    for fix in refused.value.fix.split(", or "):
        kept = [word for word in words if not word.startswith("parallel=")] if "parallel=" in fix.split()[0] else words
        check_parallel_dims(composed(*kept, *fix.split()), ranks)
