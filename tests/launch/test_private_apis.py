"""Private parts of libraries that the launcher leans on, each behind one module, are as that module expects them.

A failure here after an update names the library and the module to look at, before a run finds out.
"""

import importlib.util
import inspect
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest

from launch.jobs import handles, sbatch

TAKEN = ("command", "folder", "map_count", "job_name", "partition", "time", "nodes", "ntasks_per_node", "cpus_per_task")
TAKEN += ("gpus_per_node", "qos", "setup", "mem", "signal_delay_s", "comment", "constraint", "exclude", "account")
TAKEN += ("gres", "array_parallelism", "additional_parameters", "srun_args")
"""What ``launch.plan.placement.slurm_resources`` may ask for, and what ``sbatch_text`` adds."""


def changed(library: str, what: str, module: str) -> str:
    return f"{what} of {library} {version(library)} is not what {module} expects: compare it, and change {module}"


def check_parameters(function: Callable[..., Any], names: tuple[str, ...], message: str) -> None:
    there = inspect.signature(function).parameters
    missing = [name for name in names if name not in there]
    assert not missing, f"{message} (no parameter {', '.join(missing)})"


def test_submitit_writes_the_batch_script_from_the_same_parameters() -> None:
    from submitit.slurm import slurm

    message = changed("submitit", "slurm.slurm._make_sbatch_string", "launch/jobs/sbatch.py")
    assert hasattr(slurm, "_make_sbatch_string"), message
    check_parameters(slurm._make_sbatch_string, TAKEN, message)
    needed = [p for p in inspect.signature(slurm._make_sbatch_string).parameters.values() if p.default is p.empty]
    assert [p.name for p in needed] == ["command", "folder"], f"{message} (more is required than command and folder)"
    text = slurm._make_sbatch_string(command="python x", folder="jobs/%j", nodes=2, additional_parameters={"a_b": True})
    assert text.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2\n" in text and "#SBATCH --a-b\n" in text, message


def test_submitit_runs_the_same_modules_and_keeps_the_process_of_a_local_job() -> None:
    from submitit.local.local import LocalJob

    for name in (sbatch.SUBMISSION, handles.CONTROLLER):
        assert importlib.util.find_spec(name) is not None, changed(
            "submitit", f"module {name}", "launch/jobs/sbatch.py"
        )
    source = inspect.getsource(LocalJob)
    assert "self._process" in source, changed("submitit", "LocalJob._process", "launch/jobs/sbatch.py")


def test_elastic_is_polled_and_keeps_its_ranks_as_before() -> None:
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, Worker, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    def message(what: str) -> str:
        return changed("torch", what, "launch/agent/elastic.py")

    parameters = list(inspect.signature(LocalElasticAgent._monitor_workers).parameters)
    assert parameters == ["self", "worker_group"], message("LocalElasticAgent._monitor_workers")
    check_parameters(LocalElasticAgent.__init__, ("spec", "logs_specs"), message("LocalElasticAgent.__init__"))
    loop = inspect.getsource(SimpleElasticAgent._invoke_run)
    assert "self._monitor_workers(" in loop, message("SimpleElasticAgent._invoke_run, which polls no more,")
    assert "self._exit_barrier()" in loop, message(
        "SimpleElasticAgent._exit_barrier, by which nodes wait for each other,"
    )
    kept = ((LocalElasticAgent, "_pcontext"), (SimpleElasticAgent, "_worker_group"), (SimpleElasticAgent, "_store"))
    for owner, attribute in kept:
        assert f"self.{attribute}" in inspect.getsource(owner.__init__), message(f"{owner.__name__}.{attribute}")
    handlers = inspect.getsource(SubprocessContext)
    assert "subprocess_handlers" in handlers, message("SubprocessContext.subprocess_handlers")
    assert "global_rank" in inspect.signature(Worker.__init__).parameters, message("Worker.global_rank")
    assert "workers" in dir(WorkerGroup) or "workers" in WorkerGroup.__slots__, message("WorkerGroup.workers")


def test_hydra_splits_a_sweep_as_before() -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    message = changed("hydra-core", "BasicSweeper.split_arguments", "launch/config/sweep_points.py")
    assert hasattr(BasicSweeper, "split_arguments"), message
    assert list(inspect.signature(BasicSweeper.split_arguments).parameters) == ["overrides", "max_batch_size"], message
    typed = OverridesParser.create().parse_overrides(["a=1,2", "b=x"])
    assert [parsed.is_sweep_override() for parsed in typed] == [True, False], message
    assert BasicSweeper.split_arguments(typed, None) == [[["a=1", "b=x"], ["a=2", "b=x"]]], message


def test_a_change_is_told_with_the_module_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from submitit.slurm import slurm

    monkeypatch.setattr(slurm, "_make_sbatch_string", lambda command, folder: SimpleNamespace())
    with pytest.raises(
        AssertionError, match=r"submitit .* is not what launch/jobs/sbatch.py expects.*no parameter map"
    ):
        test_submitit_writes_the_batch_script_from_the_same_parameters()
