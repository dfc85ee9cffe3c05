"""Advice where a GPU is used little: what the steps of a point are made of, and what to type against it.

Owns when there is any, and the sentences. Must not compute figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.report.losses import LOSSES, REST, phase_shares
from launch.report.series import MeasuredPoint, drop_warmup

LOW_MFU = 0.2
WORTH_NAMING = 0.1
"""Share of the step from which a phase other than computation is what to look at."""
ADVICE = {
    "communication": "More work between two reductions hides it: a larger optim.global_batch, or fewer nodes; "
    "python -m launch.doctor measures the links.",
    "stragglers": "All ranks wait for the slowest: scaling.html shows which one, and on which host.",
    "data": "Token files on a filesystem that is nearer (data.path), prepared by python -m gpt.prepare.",
    "bubble": "More micro-batches fill the pipeline: a smaller optim.max_micro_batch.",
    "optimizer": "parallel=zero1 divides the optimizer among the ranks.",
    REST: "Larger matrices use a GPU better: a larger optim.max_micro_batch, as far as memory goes, and "
    "precision=bf16.",
}


def low_mfu(members: Sequence[MeasuredPoint]) -> list[str]:
    """Advise on points of the GPT library whose MFU is low, by what most of their lost time is."""
    told = []
    for member in members:
        mfu = None if member.figures is None else member.figures.mfu_palm
        if mfu is None or mfu >= LOW_MFU or not member.point.is_gpt:
            continue
        shares = phase_shares(drop_warmup(member.point.steps))
        known = {phase: share for phase, share in shares.items() if phase != REST}
        most = max(known, key=lambda phase: known[phase], default=REST)
        most = most if known.get(most, 0.0) >= WORTH_NAMING else REST
        made_of = ", ".join(f"{LOSSES[phase]} {100 * share:.1f} %" for phase, share in shares.items())
        steps = f" Its steps are {made_of}." if known else ""
        told.append(
            f"MFU at {member.point.title} is {100 * mfu:.1f} %, below {100 * LOW_MFU:.0f} %.{steps} {ADVICE[most]}"
        )
    return told
