"""Command line of the sandbox: ``python -m slurm.sandbox up``, and ``--help`` for the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.errors import CommandParser, ConfigError, refusing
from slurm.sandbox import faults
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.state import SandboxError, Settings, default_directory

EXAMPLES = """examples:
  python -m slurm.sandbox up --nodes 4 --gpus-per-node 2
  python -m slurm.sandbox up --partitions short:MaxTime=5 long --set SlurmdTimeout=10
  python -m slurm.sandbox power-cut n3 && python -m slurm.sandbox heal n3
  python -m slurm.sandbox link n1 n2 --bandwidth-mbit 100 --loss-percent 0.5
  python -m slurm.sandbox preempt 12
  python -m slurm.sandbox down

two clusters that know each other:
  python -m slurm.sandbox up --accounting
  python -m slurm.sandbox up --dir /tmp/beta --cluster-name beta --join ~/.local/state/slurm-sandbox
  sinfo --clusters=sandbox,beta
"""
UP: dict[str, dict[str, Any]] = {
    "nodes": {"type": int, "help": "number of nodes"},
    "cpus_per_node": {"type": int, "help": "CPUs that Slurm gives to jobs on each, whatever the machine has"},
    "gpus_per_node": {"type": int, "help": "fake GPUs on each"},
    "memory_gib_per_node": {"type": int, "help": "memory that Slurm checks --mem against, whatever the machine has"},
    "partitions": {
        "nargs": "+",
        "metavar": "NAME[:KEY=VALUE,...]",
        "help": "in the words of slurm.conf; the first is the default, later ones preempt earlier ones",
    },
    "cluster_name": {"metavar": "NAME", "help": "Slurm's name of the cluster"},
    "join": {"metavar": "DIR", "help": "share the slurmdbd of the sandbox in DIR: sbatch --clusters"},
}
"""Field of ``Settings`` -> arguments of its option on the command line."""
FAULTS = {
    "power-cut": (faults.power_cut, "switch nodes off, without a message to anyone"),
    "cut-link": (faults.cut_link, "cut the network cable of nodes; they run on"),
    "freeze": (faults.freeze, "stop every process of nodes; their kernel still answers"),
    "heal": (faults.heal, "undo power-cut, cut-link, freeze and link, and resume drained nodes"),
}

Command = Callable[[Cluster, argparse.Namespace], Iterator[str]]
"""Function that runs a subcommand and yields the lines to print."""


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand.

    Returns the exit status: 0 done, 1 failed, 2 refused, 3 no sandbox is up (``status`` only).
    """
    options = _parser().parse_args(arguments)
    try:
        for line in options.command(Cluster(options.dir), options):
            print(line, flush=True)
    except SandboxError as error:
        print(f"slurm.sandbox: {error}", file=sys.stderr)
        return 1
    except ConfigError as error:
        if options.command is not _status:
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> CommandParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common])
        sub.set_defaults(command=command)
        return sub

    up = add("up", _up, "start a sandbox and print how to use it")
    for name, words in UP.items():
        default = getattr(Settings, name)
        shown = " ".join(default) if isinstance(default, tuple) else default or "none"
        help = f"{words['help']} ({shown})"
        up.add_argument(f"--{name.replace('_', '-')}", default=default, **{**words, "help": help})
    text = "a line of slurm.conf, in place of the sandbox's own (repeat for more), such as SlurmdTimeout=10"
    up.add_argument("--set", dest="slurm_conf", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = "have the nodes share this host on purpose"
    up.add_argument("--no-namespaces", dest="namespaces", action="store_false", help=text)
    up.add_argument("--accounting", action="store_true", help="with a slurmdbd and a MariaDB of its own, for sacct")
    up.add_argument("--timeout-s", type=float, default=60.0, help="time that the nodes have to start (%(default)s)")
    add("down", _down, "end everything a sandbox started, and remove its directory")
    add("status", _status, "show every node; exit status 3 where no sandbox is up")
    for name, (fault, text) in FAULTS.items():
        sub = add(name, _node_fault, text)
        sub.set_defaults(fault=fault)
        sub.add_argument("node", nargs="*" if name == "heal" else "+", help="a node's name, such as n3; heal: (all)")
    link = add("link", _link, "limit the network cable of nodes, each direction alike; without options, free it")
    link.add_argument("node", nargs="+", help="a node's name, such as n3")
    link.add_argument("--bandwidth-mbit", type=float, metavar="MBIT", help="megabits a second")
    link.add_argument("--loss-percent", type=float, metavar="PERCENT", help="packets that get lost")
    link.add_argument("--latency-ms", type=float, metavar="MS", help="delay of a packet; a round trip takes two")
    add("stop-controller", _stop_controller, "end slurmctld; nodes and jobs run on, and no command is answered")
    add("start-controller", _start_controller, "start slurmctld again, from its saved state")
    preempt = add("preempt", _preempt, "submit a job that preempts a running one, and print its id")
    preempt.add_argument("job", help="the id of a running job")
    preempt.add_argument("--seconds", type=int, default=5, help="time that the new job takes (%(default)s)")
    return parser


def _up(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    given = {name: value for name, value in vars(options).items() if hasattr(Settings, name)}
    for name in ("partitions", "slurm_conf"):
        given[name] = tuple(given[name])
    given["join"] = given["join"] and str(Path(given["join"]).resolve())
    state = cluster.up(Settings(**given), timeout_s=options.timeout_s)
    names = list(state.nodes)
    yield f"{len(names)} nodes are idle: {names[0]} to {names[-1]}. To use them, from this machine:"
    yield f"  export SLURM_CONF={state.slurm_conf}\n  srun --nodes={min(2, len(names))} hostname"
    yield f"To take them away:\n  python -m slurm.sandbox down{cluster.option}"
    if state.why_one_host:
        yield f"The nodes share this host, because: {state.why_one_host}"
        yield "So they have one address and one /dev/shm between them, and these are refused:"
        yield "  power-cut, cut-link, freeze, link"


def _down(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    yield f"took down {cluster.directory}" if cluster.down() else f"nothing is up in {cluster.directory}"


def _status(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    nodes = cluster.status()
    yield f"{'node':6} {'address':22} {'power':6} {'link':5} {'processes':10} slurm"
    for node in nodes:
        power, link = "on" if node.power else "off", "up" if node.link else "cut"
        processes = "frozen" if node.frozen else "run" if node.power else "gone"
        yield f"{node.name:6} {f'{node.at.address}:{node.at.port}':22} {power:6} {link:5} {processes:10} {node.slurm}"
    yield f"export SLURM_CONF={cluster.env['SLURM_CONF']}"


def _node_fault(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    yield from (options.fault(cluster, name) for name in options.node or cluster.nodes)
    if options.fault is not faults.heal:
        yield f"to undo it: python -m slurm.sandbox heal {' '.join(options.node)}{cluster.option}"


def _link(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    limits = {name: getattr(options, name) for name in ("bandwidth_mbit", "loss_percent", "latency_ms")}
    yield from (faults.link(cluster, name, **limits) for name in options.node)


def _preempt(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    yield faults.preempt(cluster, options.job, seconds=options.seconds)


def _stop_controller(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    cluster.stop_controller()
    yield f"slurmctld is stopped; to start it: python -m slurm.sandbox start-controller{cluster.option}"


def _start_controller(cluster: Cluster, options: argparse.Namespace) -> Iterator[str]:
    cluster.start_controller()
    yield "slurmctld runs"


if __name__ == "__main__":
    sys.exit(main())
