"""``python -m launch.why RUN``: the cause of a failed or hanging run in one sentence, the facts, and what to type next.

    python -m launch.why outputs/scaling/nodes=2

For a run that makes no steps now, the command requests the stacks of all ranks. It changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import gpt_launch.own_names  # noqa: F401
from gpt_launch import as_typed
from launch.attach.__main__ import stacks_of
from launch.errors import CommandParser, refusing
from launch.logs import add_run, find_run
from launch.slurm.client import accounted_state
from launch.slurm.jobs import SlurmJob
from launch.slurm.status import RunStatus, poll, verdict_of
from launch.why.facts import job_event
from launch.why.rules import Verdict, find_verdict


def verdict_now(point: RunStatus) -> Verdict | None:
    """Return the verdict on a run: from the stacks of its ranks if it runs without new steps, else from its folder.

    None if nothing in the newest attempt has failed.
    """
    poll([point], trust_log=True)
    if point.state == "running" and point.quiet_s is not None:
        now = {**job_event(""), "event": "stacks"}
        return find_verdict(
            point.folder, [{**now, "rank": rank, "traceback": text} for rank, text in stacks_of(point).items()]
        )
    verdict = verdict_of(point)
    if verdict and verdict.kind == "unknown" and isinstance(point.job, SlurmJob):
        return find_verdict(point.folder, [job_event(accounted_state(point.job.job_id))])
    return verdict


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict on a run, with the facts that show it.

    Returns the exit status: 0, 1 if Slurm did not answer, 2 if there is no such run.
    """
    parser = CommandParser(prog="python -m launch.why", description="Say why a run failed, or why it hangs.")
    add_run(parser)
    args = parser.parse_args(arguments)
    point = find_run(args.path)
    verdict = verdict_now(point)
    if verdict is None:
        print(f"{point.name}: no verdict: it is {point.state}, and nothing of its newest attempt has failed")
        return 0
    facts = "\n".join(f"  {text}  [{source}]" for text, source in verdict.evidence)
    print(as_typed(f"{point.name}: {verdict.kind}\n{facts}\n{verdict}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
