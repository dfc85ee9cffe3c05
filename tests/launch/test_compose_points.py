"""Points of a sweep composed from what they share, against Hydra's own composition of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.config.compose import compose_launch, compose_points, register, typed_config
from launch.errors import ConfigError

POINTS = [
    ["nodes=1", "optim.lr=0.0003"],
    ["nodes=2", "optim.lr=0.0004"],
    ["nodes=2", "parallel=fsdp", "seed=3"],
    ["parallel=fsdp", "nodes=4", "cluster=slurm"],
]


@pytest.fixture
def loader() -> Iterator[ConfigLoader]:
    with initialize_config_module("configs", version_base="1.3"):
        register(["nodes=1"])
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra.config_loader


@pytest.fixture
def command(loader: ConfigLoader) -> DictConfig:
    return loader.load_configuration("config", [], RunMode.MULTIRUN)


def test_points_are_those_that_hydra_composes_one_by_one(loader: ConfigLoader, command: DictConfig) -> None:
    for point, composed in zip(POINTS, compose_points(loader, command, POINTS), strict=True):
        whole = loader.load_sweep_config(command, point)
        expected = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        assert OmegaConf.to_container(composed) == OmegaConf.to_container(expected)
        # Of the same type as Hydra's, so that nothing is merged with the schema, as what has lost its type is.
        assert OmegaConf.get_type(composed) is OmegaConf.get_type(whole) is not OmegaConf.get_type(expected)
        assert typed_config(composed) == typed_config(expected)


def test_points_that_choose_alike_are_composed_once(
    loader: ConfigLoader, command: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    compose = loader.load_sweep_config
    monkeypatch.setattr(loader, "load_sweep_config", lambda *given: made.append(given[1]) or compose(*given))
    points = [[f"nodes={nodes}", f"seed={seed}"] for nodes in (1, 2) for seed in (1, 2)]
    assert [(c.nodes, c.seed) for c in compose_points(loader, command, points)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert made == [[]]


def test_an_unknown_key_is_refused_as_hydra_refuses_it(loader: ConfigLoader, command: DictConfig) -> None:
    with pytest.raises(HydraException) as ours:
        list(compose_points(loader, command, [["nodez=1"]]))
    with pytest.raises(HydraException) as theirs:
        loader.load_sweep_config(command, ["nodez=1"])
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "words",
    [
        ["optim.lr=1e-4", "nodes=2", "name=a b"],
        ["model=gpt2_124m", "parallel=fsdp", "optim.max_steps=7", "cluster=slurm", "cluster.exclude=null"],
        ["experiment=weak_scaling", "ranks_per_node=2", "~wandb"],
        ["workload=script", "script.path=train.py", "script.options.lr=3e-4", "script.args=[--x,1]"],
        ["hydra.job.chdir=true", "nodes=3", "+data.sources=[]"],
    ],
    ids=lambda words: words[0],
)
def test_values_are_set_in_what_was_composed_before_as_hydra_sets_them(words: list[str]) -> None:
    def composed(again: bool) -> object:
        try:
            if again:
                return OmegaConf.to_container(compose_launch(words))
            with initialize_config_module("configs", version_base="1.3"):  # inside which Hydra composes the whole
                return OmegaConf.to_container(compose_launch(words))
        except ConfigError as error:
            return str(error)

    whole = composed(again=False)
    assert [composed(again=True), composed(again=True)] == [whole, whole]
    changed = compose_launch(["nodes=1"])
    changed.nodes = 5
    assert compose_launch(["nodes=1"]).nodes == 1
