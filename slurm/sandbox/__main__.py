"""The command line of the sandbox: ``python -m slurm.sandbox up``, and ``--help`` for the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from launch.errors import CommandParser, ConfigError, refusing
from slurm.sandbox import faults
from slurm.sandbox.cluster import Cluster, NodeStatus
from slurm.sandbox.processes import SandboxError
from slurm.sandbox.state import Settings, State, default_directory

DEFAULTS = Settings()
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


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Do one subcommand; 0 where it succeeded, 1 where it failed, 2 where it was refused, 3 where nothing is up."""
    options = _parser().parse_args(arguments)
    command: Callable[[Cluster, argparse.Namespace], int] = options.command
    try:
        return command(Cluster(options.dir), options)
    except SandboxError as error:
        print(f"slurm.sandbox: {error}", file=sys.stderr)
        return 1


def _up(cluster: Cluster, options: argparse.Namespace) -> int:
    state = cluster.up(
        Settings(
            nodes=options.nodes,
            cpus_per_node=options.cpus_per_node,
            gpus_per_node=options.gpus_per_node,
            memory_gib_per_node=options.memory_gib_per_node,
            partitions=tuple(options.partitions),
            slurm_conf=tuple(options.set),
            namespaces=options.namespaces,
            accounting=options.accounting,
            cluster_name=options.cluster_name,
            join=str(options.join.resolve()) if options.join else "",
        ),
        timeout_s=options.timeout_s,
    )
    print(_how_to_use(state, cluster.option), flush=True)
    return 0


def _how_to_use(state: State, where: str) -> str:
    names = list(state.nodes)
    lines = [f"{len(names)} nodes are idle: {names[0]} to {names[-1]}. To use them, from this machine:"]
    lines += [f"  export SLURM_CONF={state.slurm_conf}"]
    lines += [f"  srun --nodes={min(2, len(names))} hostname", "To take them away:"]
    lines += [f"  python -m slurm.sandbox down{where}"]
    if state.mode == "one-host":
        lines += [f"The nodes share this host, because: {state.why_one_host}"]
        lines += ["So they have one address and one /dev/shm between them, and these are refused:"]
        lines += [f"  {', '.join(faults.NEEDS_NAMESPACES)}"]
    return "\n".join(lines)


def _down(cluster: Cluster, options: argparse.Namespace) -> int:
    print(f"took down {cluster.directory}" if cluster.down() else f"nothing is up in {cluster.directory}")
    return 0


def _status(cluster: Cluster, options: argparse.Namespace) -> int:
    try:
        nodes = cluster.status()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 3
    print(f"{'node':6} {'address':22} {'power':6} {'link':5} {'processes':10} slurm")
    for entry in nodes:
        print(_status_line(entry))
    print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}")
    return 0


def _status_line(entry: NodeStatus) -> str:
    address = f"{entry.address}:{entry.port}"
    power, link = "on" if entry.power else "off", "up" if entry.link else "cut"
    processes = "frozen" if entry.frozen else "run" if entry.power else "gone"
    return f"{entry.name:6} {address:22} {power:6} {link:5} {processes:10} {entry.slurm}"


def _node_fault(fault: Callable[[Cluster, str], str]) -> Callable[[Cluster, argparse.Namespace], int]:
    def command(cluster: Cluster, options: argparse.Namespace) -> int:
        for name in options.node or cluster.nodes:
            print(fault(cluster, name), flush=True)
        if fault is not faults.heal:
            print(f"to undo it: python -m slurm.sandbox heal {' '.join(options.node)}{cluster.option}")
        return 0

    return command


def _link(cluster: Cluster, options: argparse.Namespace) -> int:
    for name in options.node:
        limits = (options.bandwidth_mbit, options.loss_percent, options.latency_ms)
        done = faults.link(cluster, name, bandwidth_mbit=limits[0], loss_percent=limits[1], latency_ms=limits[2])
        print(done, flush=True)
    return 0


def _preempt(cluster: Cluster, options: argparse.Namespace) -> int:
    print(faults.preempt(cluster, options.job, seconds=options.seconds))
    return 0


def _stop_controller(cluster: Cluster, options: argparse.Namespace) -> int:
    cluster.stop_controller()
    print(f"slurmctld is stopped; to start it: python -m slurm.sandbox start-controller{cluster.option}")
    return 0


def _start_controller(cluster: Cluster, options: argparse.Namespace) -> int:
    cluster.start_controller()
    print("slurmctld runs")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m slurm.sandbox",
        description="A real Slurm cluster on this machine, and faults to try on it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = CommandParser(add_help=False)
    common.add_argument("--dir", type=Path, metavar="DIR", help=f"where the sandbox lies ({default_directory()})")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[Cluster, argparse.Namespace], int], text: str) -> CommandParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common])
        sub.set_defaults(command=command)
        return sub

    _add_up_options(add("up", _up, "start a sandbox and print how to use it"))
    add("down", _down, "end everything a sandbox started, and remove its directory")
    add("status", _status, "show every node; exit status 3 where no sandbox is up")
    for name, fault, text in (
        ("power-cut", faults.power_cut, "switch nodes off without a word to anyone"),
        ("cut-link", faults.cut_link, "pull the network cable of nodes; they run on"),
        ("freeze", faults.freeze, "stop every process of nodes; their kernel still answers"),
    ):
        add(name, _node_fault(fault), text).add_argument("node", nargs="+", help="a node's name, such as n3")
    heal = add("heal", _node_fault(faults.heal), "undo power-cut, cut-link, freeze and link, and resume drained nodes")
    heal.add_argument("node", nargs="*", help="a node's name, such as n3 (all nodes)")
    link = add("link", _link, "limit the network cable of nodes, each direction alike; without options, free it")
    link.add_argument("node", nargs="+", help="a node's name, such as n3")
    link.add_argument("--bandwidth-mbit", type=float, metavar="MBIT", help="megabits a second")
    link.add_argument("--loss-percent", type=float, metavar="PERCENT", help="packets that get lost")
    link.add_argument("--latency-ms", type=float, metavar="MS", help="delay of a packet; a round trip takes two")
    add("stop-controller", _stop_controller, "end slurmctld; nodes and jobs go on, and nobody answers")
    add("start-controller", _start_controller, "start slurmctld again, from its saved state")
    preempt = add("preempt", _preempt, "submit a job that preempts a running one, and print its id")
    preempt.add_argument("job", help="the id of a running job")
    preempt.add_argument("--seconds", type=int, default=5, help="how long the new job keeps the nodes (%(default)s)")
    return parser


def _add_up_options(up: CommandParser) -> None:
    up.add_argument("--nodes", type=int, default=DEFAULTS.nodes, help="number of nodes (%(default)s)")
    up.add_argument(
        "--cpus-per-node",
        type=int,
        default=DEFAULTS.cpus_per_node,
        help="CPUs that Slurm hands out on each, whatever the machine has (%(default)s)",
    )
    up.add_argument("--gpus-per-node", type=int, default=DEFAULTS.gpus_per_node, help="fake GPUs on each (%(default)s)")
    up.add_argument(
        "--memory-gib-per-node",
        type=int,
        default=DEFAULTS.memory_gib_per_node,
        help="memory that Slurm checks --mem against, whatever the machine has (%(default)s)",
    )
    up.add_argument(
        "--partitions",
        nargs="+",
        metavar="NAME[:KEY=VALUE,...]",
        default=list(DEFAULTS.partitions),
        help="in the words of slurm.conf; the first is the default, later ones preempt earlier ones (low high)",
    )
    up.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a line of slurm.conf, in place of the sandbox's own (repeat for more), such as SlurmdTimeout=10",
    )
    up.add_argument(
        "--no-namespaces", dest="namespaces", action="store_false", help="let the nodes share this host on purpose"
    )
    up.add_argument(
        "--accounting", action="store_true", help="with a slurmdbd and a MariaDB of its own, for sacct and --join"
    )
    up.add_argument("--cluster-name", default=DEFAULTS.cluster_name, metavar="NAME", help="(%(default)s)")
    up.add_argument(
        "--join", type=Path, metavar="DIR", help="share the slurmdbd of the sandbox that lies there: sbatch --clusters"
    )
    up.add_argument("--timeout-s", type=float, default=60.0, help="how long to wait for the nodes (%(default)s)")


if __name__ == "__main__":
    sys.exit(main())
