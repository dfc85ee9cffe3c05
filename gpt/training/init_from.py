"""The first weights of a run: drawn, or read from elsewhere (``init_from``).

Owns that every rank has the same ones, or that all of them refuse. One rank reads a source through and chooses; then
each reads for itself, since all see the same files. Must not know what is in the files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt.checkpoint import folders
from gpt.config import TrainConfig
from gpt.conversion.source import find_source, refuse_other_model
from gpt.conversion.state_dict import State, VerifiedSource, read_source, verify_source
from gpt.model.gpt import GPT
from gpt.model.init import Weights, initial_weights
from gpt.parallel.distributed import World
from launch.errors import ConfigError
from launch.runs.folder import RunFolder


def first_weights(
    model: GPT, config: TrainConfig, folder: RunFolder, world: World
) -> tuple[Weights, dict[str, Any] | None]:
    """Choose the weights that a run begins with; collective.

    Args:
        model: whole, maybe on the meta device.
        config: of the run.
        folder: of the run; where it holds a checkpoint, nothing is drawn or read that would be replaced at once.
        world: all ranks.

    Returns:
        The weights, and what they were read from, for the records; None where they were not.

    Raises:
        ConfigError: on every rank, where any of them cannot use the source.
    """
    if world.on_first(lambda: bool(folders.steps(folder.checkpoints))):
        return zeros, None
    if config.init_from is None:
        return initial_weights(config.model, config.seed), None
    verified = world.on_first(lambda: look(config))
    outcome = attempt(verified, model)
    answers = world.gather(outcome if isinstance(outcome, ConfigError) else fingerprint(outcome))
    for answer in answers:
        if isinstance(answer, ConfigError):
            raise answer
    if isinstance(outcome, ConfigError) or len(set(map(str, answers))) > 1:
        raise ConfigError(
            f"init_from={config.init_from} holds other weights on some rank than on the first",
            "one folder that all nodes share",
            "init_from=FOLDER on a shared filesystem",
        )
    state = outcome
    return lambda name, shape: state[name], record(verified)


def zeros(name: str, shape: torch.Size) -> Tensor:
    """Return zeros for a tensor that a checkpoint is about to fill, without the memory of all of them."""
    return torch.zeros(()).expand(shape)


def look(config: TrainConfig) -> VerifiedSource:
    """Find the source, compare its model with the run's, and read it through."""
    assert config.init_from is not None
    source = find_source(config.init_from)
    refuse_other_model(config.model, source)
    return verify_source(source)


def attempt(verified: VerifiedSource, model: GPT) -> State | ConfigError:
    """The weights, or why this rank has none: an exception would leave the other ranks waiting."""
    try:
        return read_source(verified, model)
    except ConfigError as error:
        return error
    except OSError as error:
        return ConfigError(
            f"{verified.source.path} cannot be read on some node ({error})",
            "one folder that all nodes share",
            "init_from=FOLDER on a shared filesystem",
        )


def fingerprint(state: State) -> int:
    """Equal for equal bits, whatever the order of summation: the weights are summed as integers."""
    return sum(int(tensor.contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in state.values())


def record(verified: VerifiedSource) -> dict[str, Any]:
    """Describe where the weights come from, in plain values."""
    source = verified.source
    chosen = None if verified.checkpoint is None else folders.step_of(verified.checkpoint)
    return {"path": str(source.path), "kind": source.kind.name, "step": chosen, "sha256": verified.files}
