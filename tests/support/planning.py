"""Builders for a command line in this process: its config, its plan, or the refusal with what to type next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.plan import Plan, make_plan, write_run


def config_of(*words: str) -> Config:
    """The config of ``python -m launch words``."""
    return typed_config(compose_launch(words))


def plan(*words: str, kind: ClusterKind = ClusterKind.slurm, write: bool = False) -> Plan:
    """The plan of a command with ``cluster=`` this kind; with ``write``, in its run folder too."""
    composed = compose_launch([f"cluster={kind.name}", *words])
    made = make_plan(typed_config(composed), words, kind)
    if write:
        write_run(made, composed, words)
    return made


def refused(call: Callable[..., object], *args: Any, found: str = "", fix: str = "", said: str = "") -> ConfigError:
    """The refusal of a call, which has all three parts, and these texts in two of them, or somewhere."""
    with pytest.raises(ConfigError) as raised:
        call(*args)
    error = raised.value
    assert found in error.found and error.expected and error.fix and fix in error.fix and said in str(error), error
    return error


def directives(text: str) -> dict[str, str]:
    """The #SBATCH lines of a batch script."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}
