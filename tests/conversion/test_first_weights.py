"""``init_from`` on several ranks: all have the same weights, or all refuse with the same words."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from gpt.config import TrainConfig
from gpt.config.train import compose_train
from gpt.conversion.state_dict import State, VerifiedSource, read_source
from gpt.export import write_torch_file
from gpt.model.gpt import GPT, Weights, initialize
from gpt.parallel.distributed import World
from gpt.training import state as initial
from gpt.training.state import first_weights, zeros
from launch.errors import ConfigError
from launch.runs.compose import to_schema
from launch.runs.folder import RunFolder
from tests.support.commands import TINY
from tests.support.distributed import run_distributed


def starts(rank: int, world_size: int, file: str) -> list[tuple[str, bool]]:
    """For each fault of rank 1: what a rank was told, and whether its model has the weights of the file."""
    world = World(rank, world_size, rank, world_size, 0, torch.device("cpu"), dist.new_group(backend="gloo"))
    config = to_schema(compose_train([*TINY, f"init_from={file}"]), TrainConfig)
    expected = torch.load(file, weights_only=True)["model"]

    def unreadable(verified: VerifiedSource, model: GPT) -> State:
        raise FileNotFoundError("no such file here")

    def different(verified: VerifiedSource, model: GPT) -> State:
        return {name: tensor + (name == "norm.weight") for name, tensor in read_source(verified, model).items()}

    answers = []
    for reader in (read_source, unreadable, different):
        initial.read_source = reader if rank == 1 else read_source
        weights: Weights = zeros
        with torch.device("meta"):
            model = GPT(config.model)
        try:
            weights, source = first_weights(model, config, RunFolder(Path(file).parent / "run"), world)
            told = str(source)
        except ConfigError as error:
            told = error.found
        given = [weights(name, tensor.shape) for name, tensor in model.state_dict().items()]
        answers.append((told, all(map(torch.equal, given, expected.values()))))
    return answers


def test_every_rank_has_the_same_or_refuses(tmp_path: Path) -> None:
    config = to_schema(compose_train(TINY), TrainConfig)
    model = GPT(config.model)
    initialize(model, seed=2)
    file = tmp_path / "model.pt"
    write_torch_file(file, model.state_dict(), config.model, torch.float32, {})
    first, second = run_distributed(starts, 2, str(file))
    assert first == second
    words = ("'kind': 'torch'", "no such file here", "other weights")
    assert all(word in told for word, (told, _) in zip(words, first, strict=True))
    assert [loaded for _, loaded in first] == [True, False, False]
