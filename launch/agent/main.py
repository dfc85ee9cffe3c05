"""The agent: one process on each node, which starts the ranks of a run, watches them, and says how they ended.

    python -m launch.agent RUN_DIR          what srun starts on every node; submitit calls ``run(RUN_DIR)``

Owns the order of things on a node, from the first rendezvous of the agents to the last. Importing this module loads no
torch: the login node submits ``run`` by name.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent.avoided_hosts import points_beside, unreliable_hosts
from launch.agent.members import HeadNodeLostError, LostNode, NodesMissingError, SickNodesError
from launch.agent.memory_store import MemoryStore
from launch.agent.meter import Meter
from launch.agent.node import Node
from launch.agent.on_event import on_event
from launch.agent.outcome import (
    close_lost_attempts,
    end_lost_agents,
    handle_attempt_end,
    handle_early_stop,
    handle_missing_nodes,
    handle_sick_nodes,
    observed_end,
    refuse_replaced,
    refuse_without_budget,
)
from launch.agent.restart_policy import Action, Cause, RunFailedError
from launch.agent.stop import StopRequest
from launch.agent.takeover import take_over_as_leader
from launch.config import Config
from launch.config.compose import read_point
from launch.errors import CommandParser, ConfigError, refusing
from launch.plan.code_copy import refuse_other_code
from launch.process import lasting_imports, set_default_threads
from launch.runs.events import is_finished
from launch.runs.files import deny_others_writing
from launch.runs.folder import RunFolder
from launch.runs.rank_environment import raise_open_files, set_defaults
from launch.runs.unwritten import keep_unwritten

if TYPE_CHECKING:
    from launch.agent.fork_server import ForkServer
    from launch.agent.rendezvous import AgentGroup

TOKEN = "LAUNCH_TOKEN"


def run(run_dir: str) -> None:
    """Take this node's part in the run of ``run_dir``, to its end, over as many starts as its limits allow.

    Raises:
        RunFailedError: the run failed and does not start again.
        ConfigError: it cannot start here, as where its folder has no room for another attempt.
    """
    deny_others_writing()
    refuse_other_code()
    stop = StopRequest()
    stop.install()
    folder = RunFolder(run_dir)
    if is_finished(folder.read_events()):  # a batch script that was submitted again, or a spare that comes late
        print(f"finished already, and not started again: {run_dir} (fresh=true runs it in a new folder)", flush=True)
        return
    keep_unwritten()
    config = read_point(folder)
    node = Node.from_env(os.environ.get(TOKEN))
    raise_open_files()
    set_default_threads()  # before the libraries are loaded that ranks are forked with
    set_defaults()
    with lasting_imports():
        from launch.agent import rendezvous
        from launch.agent import workers as ranks  # all agents alike, before they meet

    stop.interruptible = True
    lost: Mapping[int, LostNode] = {}
    try:
        with (
            ranks.fork_server(folder, config) as server,
            MemoryStore() as store,
            on_event(folder, config, node.is_head),  # a thread: after what forks
            Meter(folder, node, config) as meter,
            rendezvous.join(folder, node, config) as group,
        ):
            lost = group.lost
            work_in_group(folder, node, config, group, stop, meter, server, store)
    except InterruptedError as error:
        with on_event(folder, config, node.is_head):
            handle_early_stop(folder, node, config, str(error))
    finally:
        end_lost_agents(folder, node, lost.values())
        os.umask(0o077)  # what follows is submitit's pickle of the result


def work_in_group(
    folder: RunFolder, node: Node, config: Config, group: AgentGroup, stop: StopRequest, meter: Meter,
    server: ForkServer | None, store: MemoryStore,
) -> None:  # fmt: skip
    """Start the ranks as long as there are nodes for them; the head node tells the others of the end, and of a failure.

    Raises:
        RunFailedError, ConfigError: as ``run``.
    """
    failure: str | None = None
    try:
        if node.is_head:
            refuse_without_budget(meter)
            close_lost_attempts(folder, node, config)
        start_repeatedly(folder, node, config, group, stop, meter, server, store)
    except NodesMissingError as error:
        handle_missing_nodes(folder, node, config, group, str(error))
    except SickNodesError as error:
        handle_sick_nodes(folder, node, config, error.sick)
    except HeadNodeLostError as error:
        stop.interruptible = False
        with on_event(folder, config):
            take_over_as_leader(folder, node, config, str(error), group.announced_attempt)
    except (RunFailedError, ConfigError) as error:
        failure = str(error)
        raise
    finally:
        stop.interruptible = False
        if node.is_head:
            group.end(failure)


def start_repeatedly(
    folder: RunFolder, node: Node, config: Config, group: AgentGroup, stop: StopRequest, meter: Meter,
    server: ForkServer | None, store: MemoryStore,
) -> None:  # fmt: skip
    """Start the ranks again and again, as the head node decides; a spare waits for its turn."""
    from launch.agent import workers as ranks

    for number in itertools.count():
        stop.interruptible = True
        if node.is_head:
            refuse_replaced(folder, node)
        avoid = unreliable_hosts(folder.read_events(), points_beside(folder)) if node.is_head else {}
        rdzv = group.next_round(number, avoid)
        if rdzv is None:
            return
        if node.index not in rdzv.members:
            continue
        stop.interruptible = False  # the nodes leave together from here on
        sized = config.with_nodes(len(rdzv.members))  # by which the ranks of this start are counted
        problem = ranks.run_ranks(folder, node, sized, group, rdzv, stop, meter, server, store)
        ended = observed_end(folder, rdzv.attempt, problem, stop)
        if node.is_head:
            if handle_attempt_end(folder, node, config, group, rdzv, ended, stop).action is not Action.restart:
                return
        elif ended not in (Cause.crashed, Cause.requested):
            return


@refusing
def main() -> int:
    """Run the agent of this node. Exit status 1 where the run failed, 2 where there is no run."""
    parser = CommandParser(prog="python -m launch.agent", description="Run this node's ranks of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of the run, on a filesystem all nodes share")
    try:
        run(str(Path(parser.parse_args().run_dir).absolute()))
    except RunFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
