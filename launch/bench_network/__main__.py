"""``python -m launch.bench_network nodes=2 ranks_per_node=8 cluster=slurm``: measure the links, in a short run.

    python -m launch.bench_network nodes=2                     local ranks, with gloo or NCCL
    python -m launch.bench_network nodes=4 cluster=slurm       on Slurm, with the resources of a run
    python -m launch.project SWEEP --nodes 8,...,64 --network network.json
    python -m launch parallel=auto cluster.network=network.json

Takes the arguments of ``python -m launch`` that say where a run goes.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from launch.bench_network.fit import show
from launch.config import Config
from launch.config.compose import compose_launch, require_folder, typed_config
from launch.errors import CommandParser, ConfigError, refusing
from launch.runs.environment import ROOT
from launch.runs.files import deny_others_writing, read_json, write_json
from launch.runs.measured import network_document
from launch.sweep import SweepFailedError, fail, run_sweep

SAMPLES = "samples.json"
"""File in the run folder that rank 0 writes."""


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, fit, show and write; the exit status: 0, 1 where the run failed, 2 where it was refused."""
    parser = CommandParser(
        prog="python -m launch.bench_network",
        description="Measure latency and bandwidth of each collective within a node and between nodes, in a short run.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as you would give them to python -m launch")
    parser.add_argument("--config-dir", "-cd", metavar="FOLDER", help="config files of your own")
    parser.add_argument("--output", type=Path, default=Path("network.json"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--max-mib", type=int, default=0, metavar="N", help="largest message (CPU 16, GPU 256 MiB)")
    parser.add_argument("--budget-s", type=float, default=0.25, metavar="S", help="time for each size (%(default)s)")
    typed = parser.parse_intermixed_args(arguments)
    for option, value in (("--max-mib", typed.max_mib), ("--budget-s", typed.budget_s)):
        if value < 0 or (value == 0 and option == "--budget-s"):
            raise ConfigError(f"{option} {value:g}", "a number above 0", f"{option} 1")
    output = typed.output.expanduser().absolute()
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output {output}", "a file in a folder that is there", "--output network.json")
    deny_others_writing()
    config_dir = None if typed.config_dir is None else require_folder("--config-dir", typed.config_dir)
    try:
        measured = run(typed.overrides, config_dir, typed.max_mib, typed.budget_s)
    except SweepFailedError as error:
        return fail(error)
    if measured is None:
        return 0
    from launch.bench_network.fit import Sample, fit_network  # numpy, which no refusal should wait for

    samples = [Sample(**sample) for sample in measured["samples"]]
    network = fit_network(samples, measured["ranks_per_node"])
    console = Console(soft_wrap=True)
    show(network, samples, measured, console)
    write_json(output, network_document(network, measured))
    for line in (
        f"wrote {output}; to use it:",
        f"  python -m launch.project SWEEP --nodes 8,...,64 --network {output}",
        f"  python -m launch parallel=auto cluster.network={output} ...",
    ):
        console.print(line, highlight=False, markup=False)
    return 0


def run(overrides: Sequence[str], config_dir: Path | None, max_mib: int, budget_s: float) -> dict[str, Any] | None:
    """Run the ranks to their end and return what they measured; None after a dry run.

    Raises:
        ConfigError: the run cannot be planned, or has one rank.
        SweepFailedError: it failed.
    """
    config = compose(overrides, config_dir, [])
    typed = typed_config(config)
    if typed.world_size < 2:
        raise ConfigError(
            f"nodes={typed.nodes} ranks_per_node={typed.ranks_on_node}, which is one rank",
            "two ranks or more, on one node or on several",
            "python -m launch.bench_network nodes=2",
        )
    if typed.launch.detach:
        raise ConfigError("launch.detach=true", "a command that waits for what is measured", "launch.detach=false")
    folder = new_folder(typed)
    words = [
        *(f"run_dir={folder}", f"script.options.output={folder / SAMPLES}", f"script.options.budget-s={budget_s:g}"),
        *([f"script.options.max-mib={max_mib}"] if max_mib else []),
    ]
    composed = compose(overrides, config_dir, words)
    run_sweep([(composed, [*overrides, *words])], with_report=False)
    return read_json(folder / SAMPLES) or None


def compose(overrides: Sequence[str], config_dir: Path | None, words: Sequence[str]) -> Any:
    """Compose the run of the measuring program, which is a script of the launcher's own."""
    program = ["workload=script", "script.module=launch.bench_network.measure", f"script.workdir={ROOT}"]
    ours = [*program, "name=bench_network", "script.tensorboard=false"]
    composed = compose_launch([*ours, *overrides, *words], config_dir)
    OmegaConf.resolve(composed.script.options)
    return composed


def new_folder(config: Config) -> Path:
    """A run folder that nobody had before; it is made with the run."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return Path(config.output_dir).expanduser().absolute() / "bench_network" / name


if __name__ == "__main__":
    sys.exit(main())
