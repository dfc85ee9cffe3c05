"""The workload for any program that torchrun could start: a script, a module, or a command.

Owns the plan of a point and the command of a rank; the keys under ``script`` are in ``launch.script.options``, the
refusal of what cannot start in ``launch.script.program``. What the launcher does not know of a script, such as its
memory, is absent from the plan. Torch-free.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch.errors import ConfigError
from launch.runs.compose import make_absolute
from launch.runs.damage import read_plan
from launch.runs.folder import RunFolder
from launch.runs.overrides import typed_key
from launch.runs.provenance import git
from launch.script.arguments import PLACEHOLDER, fill, keep_values, require_known, split_args, written_options
from launch.script.code import code_files
from launch.script.options import ScriptConfig, ScriptOptions
from launch.script.program import require_program
from launch.workload import CodeTree, PlanRequest, RankCommand, RankContract, WorkloadPlan, possible_sizes


def script_name(path: str | None, module: str | None, command: Sequence[str] | None) -> str:
    """Name of a run by its program, where none was typed."""
    if path:
        return Path(path).stem
    if module:
        return module.removesuffix(".__main__").rpartition(".")[2]
    return Path(command[0]).stem if command else "script"


class ScriptWorkload:
    """A user's own program, whatever it is; see docs/scripts.md."""

    name = "script"
    schema = ScriptConfig
    raw_keys = ("script.progress",)
    not_in_point = tuple(
        f"script.{key}"
        for key in (
            *(
                "path",
                "module",
                "python",
                "workdir",
                "env",
                "resumes",
                "elastic",
                "resume_args",
                "stop_signal",
                "requeue_exit",
            ),
            *("silence_timeout_s", "progress", "work_per_step", "unit", "max_steps", "tensorboard"),
        )
    )
    resumable = tuple(key for key in not_in_point if key not in ("script.path", "script.module"))

    def __init__(self) -> None:
        OmegaConf.register_new_resolver("script_name", script_name, replace=True)

    def make_paths_absolute(self, document: DictConfig) -> None:
        """Take paths relative to where the command was typed, and keep ``${run_dir}`` and the like for the ranks."""
        for key in ("args", "resume_args", "options", "env", "command"):
            raw = OmegaConf.to_container(document, resolve=False)
            assert isinstance(raw, dict)
            value = raw["script"].get(key)
            if value is not None:
                require_known(f"script.{key}", value, [str(known) for known in document])
                document.script[key] = keep_values(value)
        make_absolute([(document, "output_dir"), (document, "run_dir"), (document.script, "path")])
        if document.script.workdir is None:
            document.script.workdir = "."
        make_absolute([(document.script, "workdir")])

    def plan(self, config: ScriptConfig, request: PlanRequest) -> WorkloadPlan:
        """Check that the program is there, and tell what is known of it before it runs.

        Raises:
            ConfigError: it cannot be started.
        """
        script = config.script
        cluster = request.cluster
        require_program(script, elsewhere=not request.is_local and bool(cluster.container or cluster.setup))
        work = total_work(script, request.world_size)
        command = shlex.join(self._args(config, attempt=1))
        again = (
            "a new start goes on from the script's own checkpoint"
            if script.resumes
            else "none: an interrupted script is not started again (script.resumes=true where it has checkpoints)"
        )
        rows = {"workload": "script", "command": PLACEHOLDER.sub(r"${\1}", command), "restarts": again}
        if work is not None:
            rows["work"] = f"{work:,.12g} {script.unit.name} a step"
        if script.max_steps is not None:
            rows["steps"] = f"{script.max_steps:,}"
        facts = {"command": self._args(config, attempt=1), "unit": script.unit.name, "work_per_step": work}
        return WorkloadPlan(
            rows=rows,
            warnings=tuple(unused_keys(request)),
            facts={key: value for key, value in facts.items() if value is not None},
            max_steps=script.max_steps,
            checkpoint_kind=command,
            step_kind=command,
            resumes=script.resumes,
            fewer_nodes=possible_sizes(request, lambda fewer: require_elastic(script, fewer)),
        )

    def command(self, config: ScriptConfig, folder: RunFolder, attempt: int) -> RankCommand:
        """The program, from the copy of the code where the run has one."""
        script, copied = config.script, read_plan(folder).get("code")
        root = self.code(config).root
        values = {
            "nodes": getattr(config, "nodes", ""),
            "ranks_per_node": getattr(config, "ranks_on_node", ""),
            "world_size": getattr(config, "world_size", ""),
            "run_dir": folder.path,
            "checkpoint_dir": folder.checkpoints,
            "attempt": attempt,
            "name": config.name,
        }

        def place(path: str) -> str:
            if copied is None or not Path(path).is_relative_to(root):
                return path
            return str(Path(copied) / Path(path).relative_to(root))

        env = {key: fill(value, values) for key, value in script.env.items() if value is not None}
        if copied is not None:
            env.setdefault("PYTHONPATH", os.pathsep.join(filter(None, (copied, os.environ.get("PYTHONPATH")))))
        args = self._args(config, attempt, place(script.path) if script.path else None)
        hidden = [word for key, value in script.env.items() if value is None for word in ("-u", key)]
        if hidden:  # by env(1): torch elastic sets RANK and the like last
            args = ["env", *hidden, *args]
        assert script.workdir is not None
        return RankCommand(tuple(fill(word, values) for word in args), env=env, workdir=Path(place(script.workdir)))

    def contract(self, config: ScriptConfig, world_size: int) -> RankContract:
        """Return the behavior of ranks that need not know of their agent."""
        script = config.script
        return RankContract(
            records_events=False,
            stop_signal=script.stop_signal,
            requeue_exit=script.requeue_exit,
            resumes=script.resumes,
            silence_timeout_s=script.silence_timeout_s,
            progress=script.progress,
            unit=script.unit.name,
            work_per_step=total_work(script, world_size),
            weak_scaling=script.weak_scaling,
            max_steps=script.max_steps,
            writes_curves=script.tensorboard,
        )

    def code(self, config: ScriptConfig) -> CodeTree:
        """The repository that the program lies in, or its folder."""
        script = config.script
        start = Path(script.path).parent if script.path is not None else Path(script.workdir or ".")
        found = git(start, "rev-parse", "--show-toplevel")
        root = Path(found.decode().strip()) if found else start
        return CodeTree(root, partial(code_files, script.path), has_launcher=False)

    def _args(self, config: ScriptConfig, attempt: int, path: str | None = None) -> list[str]:
        script = config.script
        python = script.python or sys.executable
        if script.command is not None:
            program = list(script.command)
        elif script.module is not None:
            program = [python, "-m", script.module]
        else:
            program = [python, path or str(script.path)]
        args = [*program, *split_args("script.args", script.args), *written_options(script.options, script.style)]
        return args + (split_args("script.resume_args", script.resume_args) if attempt > 1 else [])


SAYS_NOTHING = (
    *("cluster.gpu_name", "cluster.gpu_memory_gib", "cluster.gpu_tflops", "cluster.matmul_efficiency"),
    *("cluster.matmul_rates", "cluster.network"),
)
"""Keys that describe nodes to a workload with a cost model, and ask for nothing."""


def unused_keys(request: PlanRequest) -> Iterator[str]:
    """Warn of typed keys that would tell a script's memory and time, of which nothing is known."""
    typed = {typed_key(word): word for word in request.overrides if "=" in word}
    words = [word for key, word in typed.items() if key in SAYS_NOTHING or key.startswith("cluster.interconnect.")]
    if words:
        yield (
            f"{', '.join(words)}: without use for a script, and no request for such nodes; cluster.partition, "
            "cluster.constraint and cluster.gres ask for them"
        )


def require_elastic(script: ScriptOptions, request: PlanRequest) -> None:
    """Raise ConfigError where the script is not said to go on with another number of ranks."""
    if not script.elastic:
        raise ConfigError(
            f"a script that is not said to go on with {request.world_size} ranks",
            "a script that reads WORLD_SIZE, and loads a checkpoint of another number of ranks",
            "script.resumes=true script.elastic=true",
        )


def total_work(script: ScriptOptions, world_size: int) -> float | None:
    """Units of work of one step, of all ranks together."""
    if script.work_per_step is None:
        return None
    return script.work_per_step * (world_size if script.weak_scaling else 1)
