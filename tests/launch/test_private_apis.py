"""Private parts of libraries that this project leans on, each behind one module, are as that module expects them.

A failure here after an update names the library and the module to look at, before a run finds out.
"""

import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.agent.after_step import submitted_run_dirs
from launch.agent.node import Node
from launch.slurm import jobs

TAKEN = ("command", "folder", "map_count", "job_name", "partition", "time", "nodes", "ntasks_per_node", "cpus_per_task")
TAKEN += ("gpus_per_node", "qos", "setup", "mem", "signal_delay_s", "comment", "constraint", "exclude", "account")
TAKEN += ("gres", "array_parallelism", "additional_parameters", "srun_args", "teardown")
"""Parameters that ``launch.plan.placement.slurm_resources`` may ask for, and that ``launch.slurm.jobs`` adds."""


def changed(library: str, what: str, module: str) -> str:
    return f"{what} of {library} {version(library)} is not what {module} expects: compare it, and change {module}"


def check_parameters(function: Callable[..., Any], names: tuple[str, ...], message: str) -> None:
    there = inspect.signature(function).parameters
    missing = [name for name in names if name not in there]
    assert not missing, f"{message} (no parameter {', '.join(missing)})"


def test_submitit_writes_the_batch_script_from_the_same_parameters() -> None:
    from submitit.slurm import slurm

    message = changed("submitit", "slurm.slurm._make_sbatch_string", "launch/slurm/jobs.py")
    assert hasattr(slurm, "_make_sbatch_string"), message
    check_parameters(slurm._make_sbatch_string, TAKEN, message)
    needed = [p for p in inspect.signature(slurm._make_sbatch_string).parameters.values() if p.default is p.empty]
    assert [p.name for p in needed] == ["command", "folder"], f"{message} (more is required than command and folder)"
    text = slurm._make_sbatch_string(command="python x", folder="jobs/%j", nodes=2, additional_parameters={"a_b": True})
    assert text.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2\n" in text and "#SBATCH --a-b\n" in text, message


def test_submitit_runs_the_same_modules_and_keeps_the_process_of_a_local_job() -> None:
    from submitit.local.local import LocalJob

    found, what = importlib.util.find_spec(jobs.SUBMISSION), f"module {jobs.SUBMISSION}"
    assert found is not None, changed("submitit", what, "launch/slurm/jobs.py")
    source = inspect.getsource(LocalJob)
    assert "self._process" in source, changed("submitit", "LocalJob._process", "launch/slurm/jobs.py")


def test_submitit_keeps_the_run_folder_where_the_batch_script_looks_for_it(tmp_path: Path) -> None:
    from submitit.core.utils import DelayedSubmission, JobPaths

    folder, node = tmp_path, Node(0, 2, "slurm-9-0-0", is_slurm=True, slurm_job="7_1")
    pickle = JobPaths(folder, "7_1").submitted_pickle
    DelayedSubmission(os.fspath, "the/run").dump(pickle)
    assert submitted_run_dirs(str(folder), node) == ["the/run"], changed(
        "submitit", "its pickle of a job", "launch/agent/after_step.py"
    )


def test_torch_elastic_has_the_private_parts_that_the_agent_uses() -> None:
    import torch
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, Worker, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def message(what: str) -> str:
        return changed("torch", what, "launch/agent/ranks.py")

    made = ("entrypoint", "args", "env", "stdout", "stderr", "local_rank_id")
    for function, names in {
        LocalElasticAgent._monitor_workers: ("self", "worker_group"),
        LocalElasticAgent.__init__: ("spec", "logs_specs"),
        api.get_subprocess_handler: made,
        SubprocessHandler.__init__: made,
        SubprocessHandler._popen: ("args", "env"),
        Worker.__init__: ("global_rank",),
    }.items():
        check_parameters(function, names, message(function.__qualname__))
    sources = {
        owner: inspect.getsource(owner)
        for owner in (SimpleElasticAgent, LocalElasticAgent, SubprocessContext, SubprocessHandler, WorkerGroup)
    }
    for owner, texts in {
        SimpleElasticAgent: ("self._monitor_workers(", "self._exit_barrier()", "self._worker_group"),
        LocalElasticAgent: ("self._pcontext",),
        SubprocessContext: ("subprocess_handlers", "get_subprocess_handler("),
        WorkerGroup: ("workers",),
    }.items():
        missing = [text for text in texts if text not in sources[owner]]
        assert not missing, message(f"{owner.__qualname__}, which has no {missing}")
    identical = inspect.getsource(SimpleElasticAgent._assign_worker_ranks)
    assert '"TORCH_ELASTIC_WORKER_IDENTICAL", "0") == "1"' in identical, message("the use of the agents' store")
    used = set(re.findall(r"\bproc\.(\w+)", sources[SubprocessContext] + sources[SubprocessHandler]))
    lacking = used - {"pid", "poll", "wait", "send_signal"}
    assert not lacking, message(f"the use of {lacking} of a process")
    assert callable(torch.cuda._is_in_bad_fork), changed("torch", "cuda._is_in_bad_fork", "launch/agent/fork_server.py")


def test_ddp_has_the_setting_for_its_step_measurements() -> None:
    from torch.nn.parallel import DistributedDataParallel

    name = "_set_ddp_runtime_logging_sample_rate"
    message = changed("torch", f"nn.parallel.DistributedDataParallel.{name}", "gpt/parallel/ddp.py")
    assert hasattr(DistributedDataParallel, name), message
    assert list(inspect.signature(getattr(DistributedDataParallel, name)).parameters) == ["self", "sample_rate"], (
        message
    )


def test_muon_orthogonalizes_one_matrix_in_a_function_of_its_own() -> None:
    from torch.optim import _muon

    message = changed("torch", "optim._muon", "gpt/parallel/optimizer.py")
    named = {"_zeropower_via_newtonschulz": ["grad", "ns_coefficients", "ns_steps", "eps"]}
    named["_adjust_lr"] = ["lr", "adjust_lr_fn", "param_shape"]
    for name, parameters in named.items():
        assert list(inspect.signature(getattr(_muon, name)).parameters) == parameters, f"{message} ({name})"
    assert isinstance(_muon.EPS, float), message


def test_adamw_steps_a_group_without_tensors() -> None:
    from torch.optim import adam

    for function in (adam._fused_adam, adam._multi_tensor_adam):
        source = inspect.getsource(function)
        assert "if len(params) == 0:" in source or "if not params:" in source, changed(
            "torch", f"optim.adam.{function.__name__}", "gpt/parallel/optimizer.py"
        )
