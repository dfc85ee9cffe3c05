"""``python -m launch.bench_network``: latency and bandwidth of each collective, inside a node and between nodes.

    python -m launch.bench_network nodes=2                     local ranks, with gloo or NCCL
    python -m launch.bench_network nodes=4 cluster=slurm       on Slurm, with the resources of a run
    python -m launch.project SWEEP --nodes 8,...,64 --network network.json
    python -m launch parallel=auto cluster.network=network.json

The command takes the arguments of ``python -m launch``. It starts a short run whose ranks measure
(``launch.bench_network.measure``), fits latency and bandwidth, and writes both into a file. The last two commands
above read this file. The command itself does not import torch.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from gpt_launch import as_typed
from launch.config.compose import compose_launch, require_config_dir, typed_config
from launch.errors import CommandParser, ConfigError, counted, refusing
from launch.report.series import fit_not_negative
from launch.runner import run_sweep
from launch.runs.environment import ROOT
from launch.runs.find import print_table
from launch.runs.folder import RunFolder, deny_others_writing, read_json, write_json
from launch.runs.measured import COLLECTIVES, FASTEST, TIERS, LinkFit, Network, network_document, terms

SCALE = np.array([1e-6, 1e-9])
"""Units in seconds: 1 us for the fitted latency, 1 ns for the fitted time per byte. Both values are near one then."""
TIER_NAMES = {"intra_node": "within a node", "inter_node": "between nodes"}


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the network, fit latency and bandwidth, print and write the fits.

    Returns the exit status: 0, 1 if the run failed, 2 if it was refused.
    """
    parser = CommandParser(
        prog="python -m launch.bench_network",
        description="Measure latency and bandwidth of each collective within a node and between nodes, in a short run.",
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as you would give them to python -m launch")
    add("--config-dir", "-cd", metavar="FOLDER", help="config files of your own")
    add("--output", type=Path, default=Path("network.json"), metavar="FILE", help="(%(default)s)")
    add("--max-mib", type=int, default=0, metavar="N", help="largest message (CPU 16, GPU 256 MiB)")
    add("--budget-s", type=float, default=0.25, metavar="S", help="time for each size (%(default)s)")
    typed = parser.parse_intermixed_args(arguments)
    for option, value in (("--max-mib", typed.max_mib), ("--budget-s", typed.budget_s)):
        if value < 0 or (value == 0 and option == "--budget-s"):
            raise ConfigError(f"{option} {value:g}", "a number above 0", f"{option} 1")
    output = typed.output.expanduser().absolute()
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output {output}", "a file in an existing folder", "--output network.json")
    deny_others_writing()
    options = {"budget-s": f"{typed.budget_s:g}", **({"max-mib": typed.max_mib} if typed.max_mib else {})}
    measured = run_measurement(typed.overrides, require_config_dir(typed.config_dir), options)
    if measured:
        samples = [Sample(**sample) for sample in measured["samples"]]
        network = fit_network(samples, measured["ranks_per_node"])
        show_network(network, samples, measured)
        write_json(output, network_document(network, measured))
        print(f"wrote {output}; to use it:")
        print(as_typed(f"  python -m launch.project SWEEP --nodes 8,...,64 --network {output}"))
        print(as_typed(f"  python -m launch parallel=auto cluster.network={output} ..."))
    return 0


def run_measurement(overrides: Sequence[str], config_dir: Path | None, options: Mapping[str, object]) -> dict[str, Any]:
    """Run the ranks until they end, and return the measurements; empty after a dry run.

    ``config_dir`` is the folder of the user's own config files, None if there is none. ``options`` are command-line
    options of ``launch.bench_network.measure``: name -> value.

    Raises:
        ConfigError: the run cannot be planned, or has one rank.
        SweepFailedError: the run failed.
    """
    program = ["workload=script", "script.module=launch.bench_network.measure", f"script.workdir={ROOT}"]
    ours = [*program, "name=bench_network"]
    config = typed_config(compose_launch([*ours, *overrides], config_dir))
    if config.world_size < 2:
        raise ConfigError(
            f"nodes={config.nodes} ranks_per_node={config.ranks_on_node}, which is one rank",
            "two ranks or more, on one node or on several",
            "python -m launch.bench_network nodes=2",
        )
    if config.launch.detach:
        raise ConfigError("launch.detach=true", "a command that waits for its ranks", "launch.detach=false")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = Path(config.output_dir).expanduser().absolute() / "bench_network" / name
    given = {"output": folder / "samples.json", **options}
    words = [f"run_dir={folder}", *(f"script.options.{key}={value}" for key, value in given.items())]
    composed = compose_launch([*ours, *overrides, *words], config_dir)
    OmegaConf.resolve(composed.script.options)
    run_sweep([(composed, [*overrides, *words])], with_report=False)
    measured, run = read_json(folder / "samples.json"), RunFolder(folder)
    if measured:
        ranks = read_json(run.environment(run.attempts()[-1])).get("ranks", ())
        measured["hosts"] = sorted({rank["host"] for rank in ranks})
    return measured


@dataclass(frozen=True)
class Sample:
    """Measured seconds of one collective, with its number of bytes and the number of ranks in its group."""

    tier: str
    collective: str
    ranks: int
    bytes: int
    seconds: float


def fit_network(samples: Sequence[Sample], ranks_per_node: int) -> Network:
    """Return latency and bandwidth of each measured collective, inside a node and between nodes.

    ``ranks_per_node`` is the number of ranks on each measured node. It is only stored in the result.
    """
    tiers: dict[str, dict[str, LinkFit]] = {}
    for tier, name in product(TIERS, COLLECTIVES):
        if found := [sample for sample in samples if (sample.tier, sample.collective) == (tier, name)]:
            tiers.setdefault(tier, {})[name] = fit_link(name, found)
    return Network(ranks_per_node, tiers)


def fit_link(collective: str, samples: Sequence[Sample]) -> LinkFit:
    """Return latency (s) and bandwidth (bytes/s) of a collective, fitted by least squares of relative errors.

    Neither latency nor time per byte is negative. With relative errors, a small message of microseconds counts as much
    as a large one.
    """
    known = [(*terms(collective, sample.ranks), sample) for sample in samples]
    rows = np.array([[count / one.seconds, share * one.bytes / one.seconds] for count, share, one in known]) * SCALE
    found = fit_not_negative(rows)
    latency_s, s_per_byte = (found * SCALE).tolist()
    bytes_per_s = min(1 / s_per_byte if s_per_byte > 0 else FASTEST, FASTEST)
    return LinkFit(latency_s, bytes_per_s, error=float(((rows @ found - 1) ** 2).mean()) ** 0.5)


def show_network(network: Network, samples: Sequence[Sample], measured: Mapping[str, Any]) -> None:
    """Print one line for each collective inside a node and between nodes: latency, bandwidth, and error of the fit.

    ``measured`` has the conditions of the measurement, such as nodes, ranks and device.
    """
    size = f"{counted(measured['nodes'], 'node')} x {counted(measured['ranks_per_node'], 'rank')}"
    print(f"{size}, {measured['device']}, {measured['backend']}, torch {measured['software']['torch']}")
    rows = []
    for tier, fits in network.tiers.items():
        for name, fit in fits.items():
            ranks = [sample.ranks for sample in samples if (sample.tier, sample.collective) == (tier, name)]
            rate = "not seen" if fit.bytes_per_s >= FASTEST else f"{fit.bytes_per_s / 1e9:.3g}"
            sizes = ", ".join(map(str, sorted(set(ranks))))
            figures = (f"{1e6 * fit.latency_s:.3g}", rate, f"{100 * fit.error:.0f} %", str(len(ranks)))
            rows.append([TIER_NAMES[tier], name, sizes, *figures])
    titles = ("tier", "collective", "ranks", "latency, us", "bandwidth, GB/s", "misfit", "samples")
    print_table(Console(), titles, rows, left=("tier", "collective"))
    print("latency of a message, and bandwidth of a rank's link; misfit: root mean square of predicted over measured")


if __name__ == "__main__":
    sys.exit(main())
