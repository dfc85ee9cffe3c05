"""Placement: the order of the candidates, when a point moves or gives up, and where it could never run."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.plan.placement import Candidate, Placement, decide, waiting_since
from launch.plan.plan import Plan, record_found, record_submitted
from launch.plan.preflight import plan_text
from launch.runs.folder import RunFolder, write_json
from launch.slurm import checks
from launch.slurm.client import JobState
from launch.slurm.failover import claim, is_current, promised
from launch.slurm.jobs import SlurmJob
from launch.slurm.status import find_run_status, update
from launch.slurm.submit import shapes
from tests.support.commands import python, run
from tests.support.doctor_facts import FACTS, request
from tests.support.planning import plan, refused
from tests.support.runs import recorded


def placed(never: list[bool], interval: float = 30, give_up: float | None = None) -> Placement:
    return Placement(
        tuple(Candidate(f"p{i}", {"partition": f"p{i}"}, never="no" if no else "") for i, no in enumerate(never)),
        interval,
        give_up,
    )


@given(
    never=st.lists(st.booleans(), min_size=1, max_size=5).filter(lambda flags: not all(flags)),
    interval=st.integers(1, 20),
    patience=st.none() | st.integers(1, 100),
    tick=st.integers(7, 400),
)
def test_a_point_that_never_starts_goes_round_and_round(
    never: list[bool], interval: int, patience: int | None, tick: int
) -> None:
    """Looked at every ``tick`` seconds for 130 minutes, against a plain cycle over the possible candidates."""
    possible = [index for index, no in enumerate(never) if not no]
    here, since, visits, gave_up, end = possible[0], 0, [(possible[0], 0)], None, 130 * 60
    for now in range(0, end, tick):
        leaves, to = decide(placed(never, interval, patience), here, now - since, now)
        if leaves and to is None:
            gave_up = now
            break
        if to is not None:
            here, since = to, now
            visits.append((here, now))
    assert [index for index, _ in visits] == list(itertools.islice(itertools.cycle(possible), len(visits)))
    stays = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(visits)]
    assert all(60 * interval <= stay < 60 * interval + tick for stay in stays)
    if len(possible) > 1 and patience is None:
        assert len(visits) > (end - tick) // (60 * interval + tick)
    first_look = None if patience is None else -(-60 * patience // tick) * tick
    assert gave_up == (first_look if first_look is not None and first_look < end else None)


def event_log(*words: str) -> list[dict[str, Any]]:
    """Events by name; ``submitted+`` is a move's, and each ``moved`` says that the wait began at 100."""
    made: list[dict[str, Any]] = []
    for number, word in enumerate(words):
        event: dict[str, Any] = {"event": word.rstrip("+"), "cause": "x"}
        if event["event"] == "submitted":
            event |= {"cluster": "slurm", "job_id": str(number), "candidate": 0, "host": "h"}
            event |= {"moved": True} if word.endswith("+") else {}
        elif word == "moved":
            event |= {"waiting_since": 100.0, "to": "p1", "candidate": 1}
        elif word in ("started", "attempt_ended"):
            event |= {"attempt": 1, "from_step": 0}
        made.append(event)
    return made


WAITS = [
    (["submitted"], 500.0),
    (["submitted", "moved", "submitted+", "refused", "moved", "stayed"], 100.0),
    (["submitted", "started", "requeued"], 500.0),
    (["submitted", "moved", "submitted+", "started", "requeued"], 500.0),
    (["submitted", "started", "requeued", "moved", "submitted+"], 100.0),
]


@pytest.mark.parametrize(("words", "since"), WAITS, ids=[" ".join(words) for words, _ in WAITS])
def test_a_wait_begins_anew_only_after_the_point_has_run(words: list[str], since: float) -> None:
    assert waiting_since(event_log(*words), 500.0) == since


OUT, RUNS = JobState("CANCELLED", "None"), JobState("RUNNING", "None")
STATES = [
    (["submitted", "moved"], None, ("pending", "moves to p1")),
    (["submitted", "moved", "stayed"], OUT, ("failed", "CANCELLED")),
    (["submitted", "moved", "cancelled"], OUT, ("cancelled", "")),
    (["submitted", "moved", "started", "finished"], None, ("finished", "")),
    (["submitted", "moved", "submitted+"], RUNS, ("running", "")),
    (["submitted", "gave_up"], OUT, ("placement_timeout", "x")),
    (["submitted", "gave_up", "started"], RUNS, ("running", "")),
]


@pytest.mark.parametrize(("words", "job", "state"), STATES, ids=[" ".join([*w, str(s[0])]) for w, _, s in STATES])
def test_a_move_is_no_cancel(words: list[str], job: JobState | None, state: tuple[str, str], tmp_path: Path) -> None:
    point = find_run_status(recorded(RunFolder(tmp_path), *event_log(*words)))
    last = max(number for number, word in enumerate(words) if word.startswith("submitted"))
    assert isinstance(point.job, SlurmJob) and point.job.job_id == str(last)
    update(point, {} if job is None else {str(last): job})
    assert (point.state, point.detail) == state


def test_the_attempts_of_a_moved_run_are_no_history(tmp_path: Path) -> None:
    log = event_log("submitted", "started", "attempt_ended", "requeued", "moved", "submitted+")
    folder = recorded(RunFolder(tmp_path), *log)
    folder.create_attempt()
    assert find_run_status(folder).attempts() == [1]


LISTED = (
    "cluster.placement=[{partition: short}, {partition: low, price_per_gpu_hour: 1.5}, {gres: 'gpu:a100:4', qos: b}]"
)


def test_a_candidate_overrides_what_the_cluster_says() -> None:
    made = plan("nodes=2", "cluster.gpus_per_node=2", "cluster.qos=a", "cluster.price_per_gpu_hour=1", LISTED)
    asked = [
        {key: candidate.slurm.get(key) for key in ("partition", "qos", "gpus_per_node", "gres")}
        for candidate in made.placement.candidates
    ]
    assert asked == [
        {"partition": "short", "qos": "a", "gpus_per_node": 2, "gres": None},
        {"partition": "low", "qos": "a", "gpus_per_node": 2, "gres": None},
        {"partition": None, "qos": "b", "gpus_per_node": None, "gres": "gpu:a100:4"},
    ]
    assert [(c.gpus, c.price_per_gpu_hour) for c in made.placement.candidates] == [(4, 1), (4, 1.5), (8, 1)]
    assert (made.world_size, made.gpu_hours, made.cost) == (4, 8, 8), "the ranks are the run's; the worst place counts"
    assert Plan.from_dict(made.as_dict()) == made
    one, other = (plan(f"cluster.placement=[{places}]") for places in ("{qos: a}", "{qos: a}, {qos: b}"))
    assert one.slurm == other.slurm and len(shapes([one, other])) == 2, "points with other candidates are no array"


def test_without_a_list_there_is_one_candidate_that_nobody_watches() -> None:
    made = plan("cluster.partition=low")
    (only,) = made.placement.candidates
    assert only.slurm == made.slurm and only.name == "" and not made.placement.is_watched
    assert "placement" not in plan_text(made)
    assert plan("cluster.give_up_after_min=5").placement.is_watched


def test_a_job_that_entered_itself_is_where_its_run_was_on_its_way_to(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    made = plan("nodes=2", "cluster.gpus_per_node=4", f"run_dir={folder.path}", LISTED)
    write_json(folder.plan, made.as_dict())
    record_submitted(made, "7", 1, moved=True)
    folder.record_event("moved", job_id="7", candidate=1, to="partition=low")
    record_found(folder, "8", 2, by="agent")
    known = {"placement": "partition=low", "partition": "low", "gpus": 8, "price_per_gpu_hour": 1.5, "candidate": 1}
    known |= {"moved": True, "nodes": 2, "cluster": "slurm"}
    first, _, event = folder.read_events()
    assert first == first | known | {"job_id": "7"} and event == event | known | {"job_id": "8", "by": "agent"}
    record_submitted(made, "8", 1, moved=True)  # by its launcher, which was only slow
    assert len(folder.read_events()) == 3

    folder.plan.write_text("{")
    record_found(folder, "9", 3, by="agent")
    assert find_run_status(folder).events() == [folder.read_events()[-1]], "a new command, for which there is no plan"
    folder.record_event("agent_started", job="slurm-9-0-0")
    folder.record_event("submitted", cluster="slurm", job_id="9", nodes=3)  # neither has seen the other's entry
    assert [e["event"] for e in find_run_status(folder).events()] == ["submitted", "agent_started", "submitted"]


def test_the_dry_run_shows_every_candidate() -> None:
    words = ("cluster=slurm", "dry_run=true", "cluster.give_up_after_min=90", LISTED)
    text = run("launch", *words, cwd=Path.cwd(), PATH="")
    for said in (
        "1. partition=short", "2. partition=low, 1.5 per GPU-hour", "the requests were not compared",
        "to the next after 30 min in the queue, round and round; given up after 90 min",
    ):  # fmt: skip
        assert said in text


IMPOSSIBLE = [
    ("{partition: short}", ["cluster.timeout_min=60"], "MaxTime of short is 30 min"),
    ("{gres: 'gpu:h100:1'}", [], "the best node of low has 0 of gpu"),
    ("{gpus_per_node: 1}", ["ranks_per_node=2"], "ranks_per_node=2 on nodes with cluster.gpus_per_node=1"),
]


@pytest.mark.parametrize(("candidate", "words", "why"), IMPOSSIBLE, ids=[why for _, _, why in IMPOSSIBLE])
def test_a_candidate_that_could_never_run_is_skipped_with_the_reason(
    candidate: str, words: list[str], why: str
) -> None:
    asking = request("cluster.timeout_min=60", *words, f"cluster.placement=[{candidate}, {{partition: low}}]")
    settled, errors = checks.possible_places(FACTS, asking)
    assert settled.possible == [1] and why in settled.candidates[0].never
    assert asking.plan.replace_placement(settled).slurm["partition"] == "low"
    checks.refuse_impossible(FACTS, asking, settled, errors[0])
    ruled_out = settled.rule_out(1, "too small")
    refusal = refused(checks.refuse_impossible, FACTS, asking, ruled_out, errors[0], found="partition=low: too small")
    assert why in refusal.found


def test_the_doctor_looks_at_every_candidate() -> None:
    late = "at partition=short: cluster.timeout_min=60, and MaxTime of short is 30 min"
    for others, level in (("{partition: short}, {partition: low}", "warning"), ("{partition: short}", "error")):
        asking = request("cluster.timeout_min=60", f"cluster.placement=[{others}]")
        found = [f"{finding.level.value} {finding.found}" for finding in checks.check_requests(FACTS, [asking])]
        assert f"{level} {late}" in found


REFUSED = [
    ([LISTED, "cluster.give_up_after_min=20"], "cluster.give_up_after_min=20 and cluster.retry_interval_min=30"),
    (["cluster.placement=[{qos: a}, {}, {qos: a}]"], "cluster.placement[2] is the same as cluster.placement[0]"),
    (["cluster.placement=[{}, {price_per_gpu_hour: -1}]"], "cluster.placement[1].price_per_gpu_hour=-1"),
    (["+cluster.additional_parameters.clusters=b"], "cluster.additional_parameters.clusters=b"),
]


@pytest.mark.parametrize(("words", "found"), REFUSED, ids=[found for _, found in REFUSED])
def test_candidates_that_make_no_sense_are_refused(words: list[str], found: str) -> None:
    refused(plan, *words, found=found)


def test_one_process_moves_a_point_and_none_that_was_cancelled_or_moved_meanwhile(tmp_path: Path) -> None:
    made = plan(f"run_dir={tmp_path}", LISTED)
    folder = RunFolder(tmp_path)
    write_json(folder.plan, made.as_dict())
    record_submitted(made, "7")
    point = find_run_status(folder)
    assert promised(point) == made
    assert is_current(point)
    ask = f"from launch.slurm.failover import *\nwith claim(RunFolder({str(tmp_path)!r})) as ours: print(ours)"
    asked = partial(python, ask, cwd=tmp_path)
    with claim(folder) as ours:
        assert ours
        assert asked() == "False\n"
    assert asked() == "True\n"
    folder.record_event("refused", candidate=1, cause="no such account")
    after = promised(point)
    assert after is not None and after.placement.possible == [0, 2]
    record_submitted(made, "8", 1, moved=True)
    assert not is_current(point), "another process has moved it"
    point = find_run_status(folder)
    assert point.job is not None and point.job.job_id == "8" and is_current(point)
    folder.record_event("cancelled", job_id="8")
    assert not is_current(point)


def test_a_moved_run_keeps_away_from_hosts_that_failed_in_it(tmp_path: Path) -> None:
    made = plan(f"run_dir={tmp_path}", "cluster.exclude=n9", LISTED)
    folder = RunFolder(tmp_path)
    write_json(folder.plan, made.as_dict())
    record_submitted(made, "7")
    folder.record_event("excluded", hosts=["n1", "n2"])
    seen = promised(find_run_status(folder))
    assert seen is not None and seen.choose_candidate(1).slurm == made.choose_candidate(1).slurm | {
        "exclude": "n9,n1,n2"
    }
