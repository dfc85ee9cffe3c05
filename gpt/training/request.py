"""The request of a command line: config, run folder, and ``parallel=auto`` for ranks without a plan.

Rank 0 looks at its device and chooses, by gpt/planning.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from gpt.checkpoint.target import check_target
from gpt.checkpoint.verify import saved_checkpoints
from gpt.config import ParallelConfig, Precision, TrainConfig
from gpt.config.compose import LENGTH, NOT_IN_POINT, RESUMABLE, compose_train, settle_parallel
from gpt.data.corpus import check_fit, describe
from gpt.parallel.distributed import World
from gpt.planning.auto import ParallelChoice, choose_parallelism
from gpt.planning.execution import choose_precision, choose_tf32
from gpt.planning.explain import table
from gpt.planning.hardware import Machine, MachineOverrides, cpus, free_memory, gpus
from gpt.topology.batch import settle_steps, split_batch
from gpt.topology.rules import check_parallel_dims, require_deepspeed
from gpt.training.execution import best_precision
from launch.errors import CommandParser, ConfigError
from launch.runs import compose
from launch.runs.events import apply_continuation, plan_continuation, refuse_alive
from launch.runs.folder import RunFolder
from launch.runs.identity import choose_folder, refuse_other_run
from launch.runs.overrides import override_of_flag, without_key


def choose_on_device(config: TrainConfig, overrides: Sequence[str], folder: RunFolder, world: World) -> ParallelChoice:
    """Choose the parallelism for the device of this rank where the command says ``parallel=auto``; print the reason."""
    choice = choose_parallelism(config, overrides, folder, world.size, lambda: machine_of(config, world))
    if choice.why:
        lines = [*table([choice.as_dict() for choice in choice.best]), *choice.left_out]
        print("\n".join([f"parallel.strategy=auto: {choice.why}", *(f"  {line}" for line in lines)]), flush=True)
    return choice


def precision_on_device(config: TrainConfig, folder: RunFolder, world: World) -> Precision:
    """Choose the precision for the device of this rank where the config leaves it open."""
    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else None
    chosen = choose_precision(config, folder, not on_gpu, name)
    if chosen is not Precision.auto:
        return chosen
    return best_precision(world.device)


def machine_of(config: TrainConfig, world: World) -> Machine:
    """Return the hardware that the estimates assume: nodes like this one.

    Raises:
        ConfigError: the device is not known.
    """
    if world.device.type != "cuda":
        return cpus(free_memory() // world.local_size, world.local_size, MachineOverrides())
    seen = torch.cuda.get_device_properties(world.device)
    stated = MachineOverrides(memory=seen.total_memory, host_memory=free_memory() // world.local_size)
    tf32 = choose_tf32(config, on_cpus=False)
    found = gpus(seen.name, config.precision, world.local_size, stated, tf32)
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


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, without composing a config.

    Raises:
        ConfigError: an unknown option.
        SystemExit: ``--help`` was printed.
    """
    parser = CommandParser(prog="python -m gpt.train", description="Train a GPT, or go on with a run.")
    parser.add_argument(
        "--run", metavar="FOLDER", help="go on with the run in FOLDER, with the config it was made with"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of configs/train.yaml")
    words, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_flag(parser, unknown[0], argv)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return words


def refuse_flag(parser: CommandParser, typed: str, argv: Sequence[str]) -> None:
    """Raise ConfigError where a flag stands for a key of the config, or for a sweep, which the launcher makes."""
    flag, _, value = typed.partition("=")
    fix: str | None = None
    if flag in ("-m", "--multirun"):
        points = [word for word in argv if word != typed] or ["nodes=1,2,4"]
        fix = shlex.join(["python", "-m", "launch", "-m", *points])
    elif flag.startswith("-"):
        following = value or next(iter(argv[argv.index(typed) + 1 :]), "")
        fix = override_of_flag(flag, following, TrainConfig)
    if fix is not None:
        raise ConfigError(f"{flag}, which {parser.prog} does not take", "KEY=VALUE for each key of the config", fix)


def parse_request(words: argparse.Namespace) -> Request:
    """Read the config of ``--run FOLDER``, or compose that of the overrides.

    Raises:
        ConfigError: the config cannot work.
    """
    if words.run:
        folder = RunFolder(Path(words.run).absolute())
        return Request(compose.read_config(folder, TrainConfig), folder)
    composed = compose_train(words.overrides)
    config = compose.to_schema(composed, TrainConfig)
    config.validate()
    return Request(config, None, composed, words.overrides)


def agree_on_folder(request: Request, world: World) -> RunFolder:
    """Let rank 0 choose the folder and write the config there; all ranks get the same, or the same refusal."""

    def choose() -> tuple[Path, ParallelConfig, int, Precision]:
        assert request.composed is not None
        folder = choose_folder(request.config, request.overrides, NOT_IN_POINT, LENGTH)
        refuse_other_run(folder, request.config, TrainConfig, RESUMABLE)
        config = replace(request.config, precision=precision_on_device(request.config, folder, world))
        choice = choose_on_device(config, request.overrides, folder, world)
        config = choice.apply(config)
        if config.checkpoint.copy_to is not None:
            check_target(config.checkpoint.copy_to, folder.path)
        refuse_what_cannot_run(config, world.size)
        go_on_as_asked(folder, config, world.size)
        request.composed.resume_from = None
        settle_parallel(request.composed, vars(choice.parallel), choice.micro_batch)
        request.composed.precision = config.precision
        compose.write_config(folder, request.composed, without_key(request.overrides, "resume_from"))
        return folder.path, choice.parallel, choice.micro_batch, config.precision

    if request.folder is not None:
        return request.folder
    config = request.config
    path, config.parallel, config.optim.max_micro_batch, config.precision = world.on_first(choose)
    return RunFolder(path)


def go_on_as_asked(folder: RunFolder, config: TrainConfig, world_size: int) -> None:
    """Take a run back to the checkpoint of ``resume_from``, or have it go on beyond its end; as the launcher does.

    Raises:
        ConfigError: there is no such checkpoint, the run has made more steps, or other ranks are at work on it.
    """
    batch = split_batch(config.optim, check_parallel_dims(config, world_size).data_ranks)
    max_steps = settle_steps(config, batch).optim.max_steps
    goes_on = plan_continuation(folder, config.resume_from, max_steps, saved_checkpoints(folder.checkpoints))
    if goes_on.back_to is not None:
        refuse_alive(folder)
    if text := goes_on.text(max_steps):
        print(f"{folder.path}: {text}", flush=True)
    apply_continuation(folder, goes_on, max_steps, saved_checkpoints(folder.checkpoints))


def refuse_what_cannot_run(config: TrainConfig, world_size: int) -> None:
    """Raise ConfigError, before there is a folder, where ranks, batch and corpus do not go together, or a
    library is missing."""
    require_deepspeed(config)
    split_batch(config.optim, check_parallel_dims(config, world_size).data_ranks)
    check_fit(describe(config.data, config.data_cache), config.model, config.eval.sequences)
