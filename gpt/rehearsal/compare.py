"""Comparison of the collectives that ranks issue, to find where a group would hang. Imports no torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, zip_longest
from typing import NamedTuple

SEND, RECEIVE = "send", "recv"


class Collective(NamedTuple):
    """A collective, or a transfer between two ranks, that one rank has issued."""

    operation: str
    """Name in torch: ``allreduce``, ``all_gather_into_tensor``, ``send``, ..."""
    group: str
    """Name of the group, equal on all of its ranks."""
    dtype: str
    bytes: int
    """Bytes that the rank gives, or receives from a peer."""
    peer: int | None
    """Rank on the other side of a transfer; None for a collective."""
    place: str
    """File and line that issued the collective."""
    batched: bool
    """True for a transfer in a batch (``batch_isend_irecv``)."""

    @property
    def content(self) -> tuple[str, str, int]:
        """The parts that have to be the same on all ranks of a group."""
        return self.operation, self.dtype, self.bytes

    def __str__(self) -> str:
        return f"{self.operation} of {self.bytes:,} bytes in {self.dtype} at {self.place}"


@dataclass(frozen=True)
class RankGroup:
    """A group of ranks that communicate."""

    label: str
    """Axis of the mesh, or ``world``."""
    ranks: tuple[int, ...]


Issued = Mapping[int, Sequence[Collective]]
"""Rank -> its collectives, in order."""


def find_hangs(issued: Issued, groups: Mapping[str, RankGroup]) -> list[str]:
    """Return one sentence for each group, or pair of ranks, that would hang; empty if there is none.

    Args:
        issued: collectives of the ranks that were rehearsed.
        groups: all groups that some rank has used, by name.
    """
    found: list[str] = []
    for name, group in groups.items():
        ranks = frozenset(group.ranks)
        of_group = {rank: [one for one in own if one.group == name] for rank, own in issued.items() if rank in ranks}
        found += unequal_collectives(group, of_group)
        found += lost_transfers(group, of_group)
        found += unjoined_batches(group, of_group)
    return found or [*crossed_orders(issued, groups)]


def unequal_collectives(group: RankGroup, of_group: Issued) -> Iterator[str]:
    """Yield one sentence on the first collective in which a group's ranks differ; nothing if all are equal."""
    ranks = list(of_group)
    own = [[one for one in calls if one.peer is None] for calls in of_group.values()]
    for number, calls in enumerate(zip_longest(*own), start=1):
        contents = Counter(None if call is None else call.content for call in calls)
        if len(contents) == 1:
            continue
        (common, _), *_ = contents.most_common()
        odd = next(i for i, call in enumerate(calls) if (None if call is None else call.content) != common)
        other = next(i for i, call in enumerate(calls) if (None if call is None else call.content) == common)
        yield (
            f"group {group.label} of {len(group.ranks)} ranks, collective {number}: rank {ranks[odd]} issues "
            f"{calls[odd] or 'none'}, and rank {ranks[other]} {calls[other] or 'none'}"
        )
        return


def crossed_orders(issued: Issued, groups: Mapping[str, RankGroup]) -> Iterator[str]:
    """Yield one sentence if ranks wait for each other in different groups, although the collectives of each group are
    equal.

    A rank waits in its oldest collective until the other rehearsed ranks of the group have reached this collective.
    """
    left = {rank: deque(one for one in own if one.peer is None) for rank, own in issued.items()}
    waiting = [rank for rank in left if left[rank]]
    while waiting:
        for rank in waiting:
            name = left[rank][0].group
            members = [other for other in groups[name].ranks if other in left]
            if all(left[other][0].group == name for other in members):
                for other in members:
                    left[other].popleft()
                break
        else:
            first = min(waiting, key=lambda rank: len(groups[left[rank][0].group].ranks))
            group = groups[left[first][0].group]
            second = next(o for o in group.ranks if o in left and groups[left[o][0].group] is not group)
            yield (
                f"collectives in another order: rank {first} waits in group {group.label} with {left[first][0]}, and "
                f"rank {second} in {groups[left[second][0].group].label} with {left[second][0]}"
            )
            return
        waiting = [rank for rank in left if left[rank]]


def lost_transfers(group: RankGroup, of_group: Issued) -> Iterator[str]:
    """Yield a message for each pair of ranks whose transfers do not match: the first transfer that only one of the two
    ranks issues, or that has another size or type on the other rank."""
    for source, target in permutations(of_group, 2):
        sent = [one for one in of_group[source] if one.operation == SEND and one.peer == target]
        received = [one for one in of_group[target] if one.operation == RECEIVE and one.peer == source]
        for number, (give, take) in enumerate(zip_longest(sent, received), start=1):
            if give is None or take is None or give.content[1:] != take.content[1:]:
                yield (
                    f"group {group.label}, transfer {number} from rank {source} to rank {target}: "
                    f"{give or 'nothing sent'}, and {take or 'nothing received'}"
                )
                break


def unjoined_batches(group: RankGroup, of_group: Issued) -> Iterator[str]:
    """Yield the first rank that takes no part before a batch of transfers in its group.

    NCCL makes the communicator of a group in the group's first collective or batch, for which NCCL waits for all ranks.
    Transfers outside of batches have communicators of their own.
    """
    first = next((one for calls in of_group.values() for one in calls if one.batched), None)
    if first is None:
        return
    for rank, calls in of_group.items():
        if not any(one.batched or one.peer is None for one in calls):
            yield (
                f"group {group.label} of {len(group.ranks)} ranks: the batch of transfers at {first.place} waits for "
                f"rank {rank}, which issues no collective and no batch in this group"
            )
            return
