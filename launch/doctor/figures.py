"""The figures of the doctor's job as a person reads them.

Owns the table. Judges nothing.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table


def group_line(results: dict[str, Any]) -> str:
    """The all-reduce over all ranks in words; empty where there was none."""
    groups = [rank["group"] for rank in results["ranks"] if "group" in rank]
    if not groups:
        return ""
    worst = min(groups, key=lambda group: float(group["bandwidth_gbit"]))
    latency = max(float(group["latency_us"]) for group in groups)
    return (
        f"all-reduce over {len(results['ranks'])} ranks ({results['ranks'][0]['backend']}): {latency:.0f} us "
        f"for 4 bytes, "
        f"{worst['bytes'] / 2**20:g} MiB at {worst['bandwidth_gbit']:.3g} Gbit/s (bus {worst['bus_gbit']:.3g})"
    )


def table(results: dict[str, Any]) -> Table:
    """What each rank is and measured."""
    shown = Table(box=None, pad_edge=False)
    for title in (
        "rank",
        "host",
        "device",
        "matmul TFLOP/s",
        "best link Gbit/s",
        "worst link Gbit/s",
        "latency us",
        "clock ms",
    ):
        shown.add_column(title, justify="left" if title in ("host", "device") else "right")
    clocks = {node["index"]: node.get("clock_offset_s") for node in results["nodes"]}
    for rank in results["ranks"]:
        rates = [link["bandwidth_gbit"] for link in rank.get("links", ())]
        delays = [link["latency_us"] for link in rank.get("links", ())]
        clock = clocks.get(rank["node"])
        shown.add_row(
            str(rank["rank"]),
            str(rank["host"]),
            str(rank["device"]),
            f"{rank['matmul_tflops']:.3g}",
            f"{max(rates):.3g}" if rates else "",
            f"{min(rates):.3g}" if rates else "",
            f"{min(delays):.0f}" if delays else "",
            "" if clock is None else f"{1000 * clock:+.3f}",
        )
    return shown
