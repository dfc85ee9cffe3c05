"""Command line of the sandbox: ``python -m slurm.sandbox up``, and ``--help`` for the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from launch.errors import CommandParser, ConfigError, refusing
from slurm.sandbox.cluster import Cluster, cut_link, freeze, heal, link, power_cut, preempt
from slurm.sandbox.state import Settings, default_directory

EXAMPLES = """examples:
  python -m slurm.sandbox up --nodes 4 --gpus-per-node 2
  python -m slurm.sandbox up --partitions short:MaxTime=5 long --set SlurmdTimeout=10
  python -m slurm.sandbox power-cut n3 && python -m slurm.sandbox heal n3
  python -m slurm.sandbox link n1 n2 --bandwidth-mbit 100 --loss-percent 0.5
  python -m slurm.sandbox preempt 12
  python -m slurm.sandbox down
"""
COMMANDS = {
    "up": "start a sandbox and print how to use it",
    "down": "end everything a sandbox started, and remove its directory",
    "status": "show every node; exit status 3 where no sandbox is up",
    "power-cut": "switch nodes off, without a message to anyone",
    "cut-link": "cut the network cable of nodes; they run on",
    "freeze": "stop every process of nodes; their kernel still answers",
    "heal": "undo power-cut, cut-link, freeze and link, and resume drained nodes",
    "link": "limit the network cable of nodes, each direction alike; without options, free it",
    "stop-controller": "end slurmctld; nodes and jobs run on, and no command is answered",
    "start-controller": "start slurmctld again, from its saved state",
    "preempt": "submit a job that preempts a running one, and print its id",
}
FAULTS = {"power-cut": power_cut, "cut-link": cut_link, "freeze": freeze, "heal": heal}
"""Commands whose only arguments are names of nodes."""
LIMITS = {
    "bandwidth_mbit": ("MBIT", "megabits a second"),
    "loss_percent": ("PERCENT", "packets that get lost"),
    "latency_ms": ("MS", "delay of a packet; a round trip takes two"),
}
"""Options of ``link``: field of ``nodes.CableLimits`` -> unit, and help text."""


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand.

    Returns the exit status: 0 done, 1 failed, 2 refused, 3 no sandbox is up (``status`` only).
    """
    options = _parser().parse_args(arguments)
    try:
        for line in _run(Cluster(options.dir), options):
            print(line, flush=True)
    except ConfigError as error:
        if options.command != "status":
            raise
        print(error, file=sys.stderr)
        return 3
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m slurm.sandbox",
        description="A real Slurm cluster on this machine, and faults to try on it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = CommandParser(add_help=False)
    common.add_argument("--dir", type=Path, metavar="DIR", help=f"directory of the sandbox ({default_directory()})")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    add: dict[str, Callable[..., object]] = {}
    for name, text in COMMANDS.items():
        description = f"{text[0].upper()}{text[1:]}."
        add[name] = commands.add_parser(name, help=text, description=description, parents=[common]).add_argument
    for setting in fields(Settings):
        if help := setting.metadata.get("help"):
            default = setting.default
            shown = " ".join(default) if isinstance(default, tuple) else default
            kind: dict[str, Any] = {"nargs": "+"} if isinstance(default, tuple) else {"type": int}
            flag, metavar = f"--{setting.name.replace('_', '-')}", setting.metadata["metavar"]
            add["up"](flag, default=default, metavar=metavar, help=f"{help} ({shown})", **kind)
    text = "a line of slurm.conf, in place of the sandbox's own (repeat for more), such as SlurmdTimeout=10"
    add["up"]("--set", dest="slurm_conf", action="append", default=[], metavar="KEY=VALUE", help=text)
    add["up"]("--timeout-s", type=float, default=60.0, help="time that the nodes have to start (%(default)s)")
    for name in (*FAULTS, "link"):
        add[name]("node", nargs="*" if name == "heal" else "+", help="a node's name, such as n3; heal: (all)")
    for name, (unit, text) in LIMITS.items():
        add["link"](f"--{name.replace('_', '-')}", type=float, metavar=unit, help=text)
    add["preempt"]("job", help="the id of a running job")
    add["preempt"]("--seconds", type=int, default=5, help="time that the new job takes (%(default)s)")
    return parser


def _run(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    """Run a subcommand and yield the lines to print."""
    match options.command:
        case "up":
            given = {name: value for name, value in vars(options).items() if hasattr(Settings, name)}
            for name in ("partitions", "slurm_conf"):
                given[name] = tuple(given[name])
            state = cluster.up(Settings(**given), timeout_s=options.timeout_s)
            names = list(state.nodes)
            yield f"{len(names)} nodes are idle: {names[0]} to {names[-1]}. To use them, from this machine:"
            yield f"  export SLURM_CONF={state.slurm_conf}\n  srun --nodes={min(2, len(names))} hostname"
            yield f"To take them away:\n  python -m slurm.sandbox down{cluster.option}"
        case "down":
            yield f"took down {cluster.directory}" if cluster.down() else f"nothing is up in {cluster.directory}"
        case "status":
            nodes = cluster.status()
            yield f"{'node':6} {'address':15} {'power':6} {'link':5} {'processes':10} slurm"
            for node in nodes:
                power, cable = "on" if node.power else "off", "up" if node.link else "cut"
                processes = "frozen" if node.frozen else "run" if node.power else "gone"
                yield f"{node.name:6} {node.address:15} {power:6} {cable:5} {processes:10} {node.slurm}"
            yield f"export SLURM_CONF={cluster.env['SLURM_CONF']}"
        case "link":
            limits = {name: getattr(options, name) for name in LIMITS}
            yield from (link(cluster, name, **limits) for name in options.node)
        case "preempt":
            yield preempt(cluster, options.job, seconds=options.seconds)
        case "stop-controller":
            cluster.stop_controller()
            yield f"slurmctld is stopped; to start it: python -m slurm.sandbox start-controller{cluster.option}"
        case "start-controller":
            cluster.start_controller()
            yield "slurmctld runs"
        case fault:
            yield from (FAULTS[fault](cluster, name) for name in options.node or cluster.nodes)
            if fault != "heal":
                yield f"to undo it: python -m slurm.sandbox heal {' '.join(options.node)}{cluster.option}"


if __name__ == "__main__":
    sys.exit(main())
