"""The request of a command line: config, run folder, and ``parallel=auto`` for ranks without a plan.

Rank 0 looks at its device and chooses, by gpt/planning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from gpt.config import TrainConfig
from gpt.config.compose import NOT_IN_POINT, RESUMABLE, compose_train, settle_parallel
from gpt.data.corpus import check_fit, describe
from gpt.parallel.distributed import World
from gpt.planning.auto import ParallelChoice, choose_parallelism
from gpt.planning.explain import table
from gpt.planning.hardware import Machine, MachineOverrides, cpus, free_memory, gpus
from gpt.topology.batch import split_batch
from gpt.topology.rules import check_parallel_dims
from launch.errors import ConfigError
from launch.runs import compose
from launch.runs.folder import RunFolder
from launch.runs.identity import choose_folder, refuse_other_run


def choose_on_device(config: TrainConfig, overrides: Sequence[str], folder: RunFolder, world: World) -> ParallelChoice:
    """Choose the parallelism for the device of this rank where the command says ``parallel=auto``; print the reason."""
    choice = choose_parallelism(config, overrides, folder, world.size, lambda: machine_of(config, world))
    if choice.why:
        lines = [*table([choice.as_dict() for choice in choice.best]), *choice.left_out]
        print("\n".join([f"parallel.strategy=auto: {choice.why}", *(f"  {line}" for line in lines)]), flush=True)
    return choice


def machine_of(config: TrainConfig, world: World) -> Machine:
    """Return the hardware that the estimates assume: nodes like this one.

    Raises:
        ConfigError: the device is not known.
    """
    if world.device.type != "cuda":
        return cpus(free_memory() // world.local_size, world.local_size, MachineOverrides())
    seen = torch.cuda.get_device_properties(world.device)
    stated = MachineOverrides(memory=seen.total_memory, host_memory=free_memory() // world.local_size)
    found = gpus(seen.name, config.precision, world.local_size, stated)
    if found is None:
        raise ConfigError(
            f"parallel.strategy=auto on a {seen.name} in precision={config.precision.name}, whose peak is not known",
            "a device of gpt/accounting/hardware.py, or python -m launch, where cluster.gpu_tflops says it",
            "parallel=fsdp, or python -m launch ... cluster.gpu_tflops=N",
        )
    return found


@dataclass
class Request:
    """The request of a command line: its config, and the run folder."""

    config: TrainConfig
    folder: RunFolder | None
    """Given with ``--run``; otherwise it follows from the overrides."""
    composed: DictConfig | None = None
    overrides: Sequence[str] = ()


def parse_request(argv: Sequence[str]) -> Request:
    """Read ``--run FOLDER``, or overrides of ``configs/train.yaml``."""
    parser = argparse.ArgumentParser(prog="python -m gpt.train", description="Train a GPT, or go on with a run.")
    parser.add_argument(
        "--run", metavar="FOLDER", help="go on with the run in FOLDER, with the config it was made with"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of configs/train.yaml")
    words = parser.parse_args(argv)
    if words.run:
        folder = RunFolder(Path(words.run).absolute())
        return Request(compose.read_config(folder, TrainConfig), folder)
    composed = compose_train(words.overrides)
    config = compose.to_schema(composed, TrainConfig)
    config.validate()
    return Request(config, None, composed, words.overrides)


def agree_on_folder(request: Request, world: World) -> RunFolder:
    """Let rank 0 choose the folder and write the config there; all ranks get the same, or the same refusal."""

    def choose() -> tuple[RunFolder, ParallelChoice]:
        assert request.composed is not None
        folder = choose_folder(request.config, request.overrides, NOT_IN_POINT)
        choice = choose_on_device(request.config, request.overrides, folder, world)
        config = choice.apply(request.config)
        refuse_what_cannot_run(config, world.size)
        refuse_other_run(folder, config, TrainConfig, RESUMABLE)
        settle_parallel(request.composed, vars(choice.parallel), choice.micro_batch)
        compose.write_config(folder, request.composed, request.overrides)
        return folder, choice

    if request.folder is not None:
        return request.folder
    folder, choice = world.on_first(choose)
    request.config.parallel, request.config.optim.max_micro_batch = choice.parallel, choice.micro_batch
    return folder


def refuse_what_cannot_run(config: TrainConfig, world_size: int) -> None:
    """Raise ConfigError, before there is a folder, where ranks, batch and corpus do not go together."""
    split_batch(config.optim, check_parallel_dims(config, world_size).data_ranks)
    check_fit(describe(config.data, config.data_cache), config.model, config.eval.sequences)
