"""The workload for a Python function: every rank calls the function that ``launch.submit`` was given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

from launch.errors import ConfigError
from launch.schema import key
from launch.script import ScriptWorkload
from launch.script.arguments import ScriptConfig
from launch.workload import PlanRequest, WorkloadPlan

# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class CallOptions:
    """The call that every rank makes."""

    file: Optional[str] = key(None, "File of the pickled function and its arguments, which launch.submit writes.")
    args: dict[str, Any] = key(dict, "Arguments of the function, for the name of the run folder and for reports.")


@dataclass
class FunctionConfig(ScriptConfig):
    """The keys that ``workload=function`` adds at the root."""

    call: CallOptions = key(CallOptions, "The function and its arguments.")

    def validate(self) -> None:
        """Raise ConfigError for the first invalid value, or if no function was given."""
        if self.call.file is None:
            raise ConfigError(
                "workload=function without a function",
                "a Python function, as the first argument of launch.submit or launch.sweep",
                "python -c 'import launch; launch.submit(FUNCTION, nodes=2)'",
            )
        super().validate()


class FunctionWorkload(ScriptWorkload):
    """A Python function that every rank calls; see docs/python.md."""

    name = "function"
    schema = FunctionConfig
    not_in_point = (*ScriptWorkload.not_in_point, "script.args", "call.file")
    resumable = (*ScriptWorkload.resumable, "script.args", "call.file")

    def plan(self, config: ScriptConfig, request: PlanRequest) -> WorkloadPlan:
        """Return the plan of a point, with the function and its arguments in place of the command.

        Raises:
            ConfigError: the ranks cannot start.
        """
        assert isinstance(config, FunctionConfig)
        plan = super().plan(config, request)
        called = f"{config.name}({', '.join(f'{name}={value}' for name, value in config.call.args.items())})"
        return replace(
            plan,
            rows={**plan.rows, "command": called},
            facts={**plan.facts, "command": called},
        )
