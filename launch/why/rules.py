"""The table of rules that turns facts about a failed or hanging attempt into a verdict. The first rule that fits wins.

A new cause is one more row in ``RULES``, above the rows that are less certain: its kind, a function that returns the
rank to blame or None, a sentence, and what to type next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from textwrap import shorten

from launch.errors import ranges
from launch.runs.events import Events, select_events
from launch.runs.folder import RunFolder
from launch.why.facts import JOB, AttemptFacts, RankFacts, read_facts


@dataclass(frozen=True)
class Verdict:
    """The cause of a failed or hanging attempt."""

    kind: str
    """Name of the rule; ``unknown`` if none fits."""
    sentence: str
    fix: str
    """What to type next."""
    rank: int | None
    """Rank that caused the failure; None if it is not one rank."""
    host: str
    place: str
    """File and line of the user's program; empty if not known."""
    step: int | None
    """Number of steps that the rank had done; None if not known."""
    evidence: tuple[tuple[str, Path], ...]
    """Facts, each with the file that shows it."""

    def __str__(self) -> str:
        return f"why: {self.sentence}\ntype next: {self.fix}"


Find = Callable[[AttemptFacts], RankFacts | None]


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    ``sentence`` and ``fix`` may contain names in braces, which ``_texts`` replaces. {failed} is rank, step, cause and
    place of a failure. {scene} says which ranks wait, and where the blamed rank is. {scenes} lists all waiting ranks.
    """

    kind: str
    find: Find
    """Function that returns the rank to blame; None if the rule does not fit."""
    sentence: str
    fix: str


# Conditions of rules.


def failed_with(pattern: str, only_first: bool = False) -> Find:
    """Return a function that finds a rank whose text ``RankFacts.said`` contains ``pattern``.

    Ranks that hung, or failed only because another rank did (an echo), are left out. With ``only_first``, only the rank
    that failed first is considered.
    """
    wanted = re.compile(pattern, re.IGNORECASE | re.MULTILINE)

    def find(facts: AttemptFacts) -> RankFacts | None:
        own = [rank for rank in (facts.first, *facts.ranks) if rank and not rank.echo and not rank.hung]
        return next((rank for rank in own[: 1 if only_first else None] if wanted.search(rank.said)), None)

    return find


def has_event(*names: str, cause: str = "") -> Find:
    """Return a function that finds the last event with one of ``names`` whose cause begins with the pattern ``cause``.

    The function returns ``RankFacts`` with the host of the event and without a rank, since it blames the host.
    """

    def find(facts: AttemptFacts) -> RankFacts | None:
        for event in reversed(select_events(facts.events, *names)):
            if re.match(cause, str(event.get("cause"))):
                return RankFacts(facts.folder.events, None, event.get("host", ""), cause=str(event.get("cause")))
        return None

    return find


def elsewhere(pattern: str) -> Find:
    """Return a function that finds the first of ``AttemptFacts.others`` if its ``activity`` contains ``pattern``.

    Mostly, this rank is outside of collectives, and has made no progress for the longest time.
    """
    wanted = re.compile(pattern, re.MULTILINE)
    return lambda facts: next((one for one in facts.others[:1] if wanted.search(one.activity)), None)


def mismatched(facts: AttemptFacts) -> RankFacts | None:
    """Return the last waiting rank if ranks wait in collectives that differ by name, place or sizes; else None.

    None also if a rank is outside of collectives. Sends and receives are not compared, since a matching pair differs.
    """
    # A send and the receive that fits it differ, too.
    waiting = [rank for rank in facts.waiting if not re.search("send|recv", rank.collective)]
    different = {(rank.collective, rank.place, str(rank.dump.get("sizes"))) for rank in waiting}
    return waiting[-1] if not facts.others and len(different) > 1 else None


def all_wait(facts: AttemptFacts) -> RankFacts | None:
    """Return the first waiting rank if all ranks of a run wait in collectives, or lost their connections there.

    None if a rank is outside of collectives, or if the run has one rank.
    """
    size = max([event.get("world_size", 0) for event in select_events(facts.events, "started")], default=0)
    return facts.waiting[0] if 1 < size == len(facts.waiting) and not facts.others else None


def diverged(facts: AttemptFacts) -> RankFacts | None:
    """Return the rank to blame if the text of a failure names a loss or gradient that is not finite; else None.

    The rank is the first that recorded such a number; if no rank has recorded one, the rank with the failure.
    """
    failed = failed_with(NOT_FINITE)(facts)
    return failed and (facts.not_finite or failed)


# The table.


LOGS = "python -m launch.logs {run} --rank {rank}"
AGAIN = "the same command, which continues from the last checkpoint if there is one"
MEMORY = "cluster.mem_gb=N with a larger N, or fewer loader workers"
# What libraries and the kernel say: Python, torch, NumPy, SQLite, Arrow, requests, Rust ("os error").
FULL = (
    r"No space left|Errno 28\b|os error 28\b|quota exceeded|Errno 122|disk is full|Not enough free space|"
    r"\d+ requested and \d+ written|iostream error|unexpected pos \d+ vs|StreamWriter failed writing"
)
NO_MEMORY = r"MemoryError\b|bad_alloc|(can't|cannot|unable to) allocate|Errno 12\b|os error 12\b|malloc of size"
GPU_MEMORY = (
    r"(CUDA|HIP|XPU)( error:)? out of memory|OutOfMemoryError|ERROR_OUT_OF_MEMORY|_ALLOC_FAILED|RESOURCE_EXHAUSTED|"
    r"failure 2 'out of memory'"
)
NOT_FINITE = (
    r"FloatingPoint|RepeatedFailure|(?<![\w/'\".-])(nans?|infs?|infinity)(?![\w/'\"-]|\.\w)|not finite|non-?finite|"
    r"(loss|training|gradients?)\b.*(diverged|exploded)|isfinite|isnan|isinf"
)
NO_WORKER = (
    r"DataLoader worker.*(killed by signal|exited unexpectedly)|BrokenProcessPool|TerminatedWorkerError|WorkerLost|"
    r"subprocesses has abruptly died"
)
NO_FILE = r"^(?!handled).*(FileNotFoundError|No such file|NoSuchKey|unable to open database file|os error 2\b)"
SERVICE = (
    r"^(?!handled).*(Connect\w*(Error|Timeout)|Disconnected|Max retries|ReadTimeout|gaierror|name resolution|"
    r"Name or service|No route to host|Network is unreachable|Connection timed out|TimeoutError: .*timed out)"
)
# Lines of stacks and states of a rank that waits. State R, which runs, waits for nothing.
FILE_LOCK = r"^state \S .*(lock_inode|fcntl_setlk|flock|nlmclnt_block)"
SOCKET = (
    r"^state S (?!unix).*socket:|^state S (?!.* [/p])(wait_woken|inet_|__inet|__skb_wait|sk_wait|sk_stream)|"
    r"^state (S .*poll|$)(.*\n)*(at .*\.(recv|recv_into|recvfrom|sendall|accept|connect)\(|in .*/(socket|ssl)\.py$)"
)
PROCESS = (
    r"^state S .*(\bdo_wait$|unix_stream|pipe:)|"
    r"^state S .*(poll|read).*(\n.*)*^in .*/(subprocess|multiprocessing/\w+)\.py$"
)
LOCKS = (
    r"^state (?!R).*\n(.*\n)*"
    r"(at .*(\.acquire\(|\bwith\b.*lock|\.join\(|\.wait\(|\.get\()|in .*/(threading|queue|queues)\.py$)"
)
READS = r"^state [^R](?! futex).*\nat .*(open\(|read|write|load\(|fsync|flush\(|stat\()"
RULES = (
    Rule("refused", has_event("start_refused"), "the ranks were not started: {cause}", "python -m launch.status {run}"),
    Rule("node_lost", has_event("node_lost"), "node {host} was lost: {cause}", "sinfo --nodes={host}"),
    Rule("bit_flip", has_event("replicas_differ"), "{cause}", "cluster.exclude=HOST with that host"),
    Rule("node_lost", has_event(JOB, cause="NODE_FAIL"), "a node of the job failed (Slurm: {cause})", AGAIN),
    Rule("oom_kill", has_event(JOB, cause="OUT_OF_ME"), "the job was killed for its memory (Slurm: {cause})", MEMORY),
    Rule(
        "time_limit",
        has_event(JOB, "attempt_ended", cause="TIMEOUT|timed_out"),
        "the job reached its time limit",
        AGAIN,
    ),
    Rule("preempted", has_event(JOB, "attempt_ended", cause="(?i)preempted"), "the job was preempted", AGAIN),
    Rule(
        "full_disk",
        failed_with(FULL),
        "{failed}: a filesystem is full, or a quota is used up",
        "df -h {run} /tmp /dev/shm, on {host}",
    ),
    Rule(
        "gpu_memory",
        failed_with(GPU_MEMORY),
        "{failed}",
        "optim.max_micro_batch=N with a smaller N; for a script, a smaller batch",
    ),
    Rule("oom_kill", failed_with("^killed by SIGKILL.*out of memory"), "{failed}", MEMORY),
    Rule("memory_error", failed_with(NO_MEMORY), "{failed}: no memory", MEMORY),
    Rule(
        "mismatched_collective",
        failed_with(r"preamble\.length|collective mismatch|between collectives"),
        "{failed}: its collective does not match those of other ranks, in size or kind",
        LOGS,
    ),
    Rule(
        "dead_loader_worker",
        failed_with(NO_WORKER),
        "{failed}: a worker process died, mostly for memory",
        "df -h /dev/shm, on {host}; fewer workers",
    ),
    Rule(
        "not_finite",
        diverged,
        "{who} has the first loss or gradient that is not finite, in step {step}",
        "the samples of rank {rank} in step {step}; optim.lr=N with a smaller N",
    ),
    Rule(
        "crash",
        failed_with("^killed by SIGBUS"),
        "{failed}: a crash in compiled code; a mapped file was cut off, or its filesystem is full",
        "df -h /dev/shm, on {host}",
    ),
    Rule("crash", failed_with("^killed by SIG(SEGV|ILL|FPE|ABRT)"), "{failed}: a crash in compiled code", LOGS),
    Rule(
        "exit_status",
        failed_with(r"\Aexit status \d+\Z|\A.*\(exit status (?!1\))\d+\)$"),
        "{failed}: the program chose this status",
        LOGS,
    ),
    Rule("missing_file", failed_with(NO_FILE), "{failed}", "ls -ld of that path, on {host}"),
    Rule("killed", failed_with("^killed by SIG"), "{failed}, by a process outside of the run", "dmesg -T, on {host}"),
    Rule(
        "network",
        failed_with(SERVICE, only_first=True),
        "{failed}: a connection of the program's own, to a service",
        LOGS,
    ),
    Rule("exception", failed_with("."), "{failed}", LOGS),
    Rule(
        "stopped",
        elsewhere(r"^stopped|^state . .*(refrigerator|freezer)"),
        "{who} is stopped, by a signal, a debugger or its cgroup{since}{at}",
        "ps -o stat,wchan,cmd, on {host}",
    ),
    Rule("slow_disk", elsewhere("^state D"), "{scene}: a file{file}, not network", "ls -l of that file, on {host}"),
    Rule("gil_held", elsewhere("^frozen"), "{scene}: none of its threads runs, so compiled code holds the GIL", LOGS),
    Rule("data", elsewhere("/torch/utils/data/"), "{scene}: data, not network", LOGS),
    Rule(
        "deadlock",
        elsewhere(FILE_LOCK),
        "{scene}: a lock of a file{file}, which another process holds, not network",
        "lslocks, on {host}",
    ),
    Rule("network", elsewhere(SOCKET), "{scene}: a connection of the program's own, no collective", LOGS),
    Rule("deadlock", elsewhere(LOCKS), "{scene}: a lock, queue or thread of its own, not network", LOGS),
    Rule("elsewhere", elsewhere(PROCESS), "{scene}: another process of the program, not network", "ps fx, on {host}"),
    Rule("slow_disk", elsewhere(READS), "{scene}: a file{file}, not network", "ls -l of that file, on {host}"),
    Rule(
        "slow_cpu",
        elsewhere("^state R"),
        "{scene}: it computes, slower than the others",
        "top, on {host}; resilience.hang_timeout_s=N with a larger N if such steps are right",
    ),
    Rule("elsewhere", elsewhere(""), "{scene}: not network", LOGS),
    Rule(
        "left_early",
        lambda facts: next((one for one in facts.ranks if one.left and facts.waiting), None),
        "{scene}",
        LOGS,
    ),
    Rule("mismatched_collective", mismatched, "the ranks wait in different collectives: {scenes}", LOGS),
    Rule(
        "network",
        all_wait,
        "{scenes}: all ranks wait in it and none failed before, so network",
        "python -m launch.doctor --on-cluster",
    ),
    Rule("unknown", lambda facts: facts.first, "unknown: {failed}", LOGS),
    Rule(
        "unknown",
        has_event("attempt_ended", JOB),
        "unknown: {cause}, and no rank recorded why",
        "python -m launch.status {run}",
    ),
)
"""Rules from the most certain to the least. What ranks and nodes recorded comes before what a hang shows."""


# A verdict.


def find_verdict(folder: RunFolder, more: Events = ()) -> Verdict | None:
    """Return the verdict on the newest attempt of a run; None if the attempt has not failed, or if no rule fits.

    ``more`` has events that the event log of ``folder`` does not have: ``job_event``, and ``stacks`` of running ranks.
    """
    facts = read_facts(folder, more)
    if has_event("attempt_ended", cause="finished|cancelled|budget")(facts):
        return None
    for rule in RULES:
        one = rule.find(facts)
        if one:
            texts = _texts(facts, one)
            sentence = rule.sentence.format(**texts)
            fix = refusal_in(one.cause)[1] or rule.fix.format(**texts)
            evidence = (*facts.evidence(), (f"{rule.kind}: {texts['who']}{texts['since']}", one.source))
            return Verdict(rule.kind, sentence, fix, one.rank, one.host, one.place, one.step, evidence)
    return None


def refusal_in(cause: str) -> tuple[str, str]:
    """Return (what was found, what to type next) from a ``cause`` that contains the text of a ConfigError.

    For another cause, return the cause itself and an empty text.
    """
    head, is_refusal, rest = cause.partition("found: ")
    found, _, expected = rest.partition("\nexpected: ")
    return (head + found, expected.partition("\ntype next: ")[2]) if is_refusal and expected else (cause, "")


def _texts(facts: AttemptFacts, blamed: RankFacts) -> dict[str, object]:
    """Return name -> text, for the names in braces in a rule's sentences. ``blamed`` is the rank to blame."""
    at = f" ({blamed.place})" if blamed.place else ""
    since = f" after step {blamed.step}" if blamed.step is not None else ""
    cause = shorten(refusal_in(blamed.cause)[0], 300, placeholder="...")
    where = "left with exit status 0" if blamed.left else "gave no stack"
    where = f"is in {blamed.own.function}{at}" if blamed.own else where
    waits = waits_text([rank for rank in facts.waiting if rank.rank != blamed.rank])
    return {
        **vars(blamed),
        "who": blamed.who,
        "file": blamed.file and f" ({blamed.file})",
        "at": at,
        "since": since,
        "cause": cause,
        "run": quote(str(facts.folder.path)),
        "failed": f"{blamed.who} failed first{since}: {cause}{at}",
        "scene": f"{waits} for {blamed.who}, which {where}" if waits else f"{blamed.who} {where}{since}",
        "scenes": waits_text(facts.waiting),
    }


def waits_text(waiting: Sequence[RankFacts]) -> str:
    """Return a text on the collectives in which ranks wait. Ranks that wait at the same place are in one phrase."""
    groups: dict[str, list[RankFacts]] = {}
    for rank in waiting:
        groups.setdefault(rank.waits_in, []).append(rank)
    return " and ".join(
        f"{ranks[0].who} waits in {where}"
        if len(ranks) == 1
        else f"ranks {ranges([rank.rank or 0 for rank in ranks])} wait in {where}"
        for where, ranks in groups.items()
    )
