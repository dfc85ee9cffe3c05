"""Startup summary of an attempt, and ``run.json``, one JSON file with the records of a run. Does not import torch."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gpt import checkpoint as folders
from gpt.accounting import training_flops_per_token
from gpt.config import Ffn, Float8, ModelConfig, TrainConfig, float8_words
from gpt.config.optim import ADAMW, MUON, SCHEDULE_FREE, describe_schedule
from launch.errors import counted
from launch.runs.events import saves_that_count
from launch.runs.folder import RunFolder, read_json, read_mapping, write_json
from launch.runs.records import StepRecord, read_records

# Startup summary of an attempt: model, configuration, hardware, and theoretical performance. This only formats the
# record of the environment.


WIDTH = 110
"""Width of the summary in columns."""


def render_summary(record: dict[str, Any], config: TrainConfig, title: str) -> str:
    """Return the startup summary of an attempt as text of several lines, without control characters.

    Args:
        record: content of ``environment.json``.
        config: config of the run.
        title: first line.
    """
    sections = {
        "Architecture": architecture_rows(config.model, record["counts"]),
        "Configuration": configuration(record, config),
        "Hardware": hardware(record),
        "Theoretical performance": performance(record, config),
    }
    lines = [title]
    for heading, rows in sections.items():
        lines.append(heading)
        for name, value in rows.items():
            lines += textwrap.wrap(f"  {name:<18}{value}", WIDTH, subsequent_indent=" " * 20, break_on_hyphens=False)
    return "\n".join(lines)


CHOICES = (
    *("norm", "norm_position", "position", "rope_scaling", "attention", "qk_norm"),
    *("kv_lora_rank", "q_lora_rank", "rope_head_width"),
    *("window", "global_every", "attention_softcap", "attention_sinks", "logit_softcap", "scale_embedding"),
    *("ffn", "ffn_activation", "ffn_width", "n_shared_expert"),
    *("parallel_residual", "bias", "tie_embeddings", "dropout"),
)
"""Fields of the model config that the summary shows, unless they are None, false or zero."""


def architecture_rows(model: ModelConfig, counts: dict[str, int]) -> dict[str, str]:
    """Return the rows of the startup summary that describe the model: label -> text. ``counts`` has the numbers of
    parameters, as ``Parameters.as_dict`` of gpt.accounting returns them."""
    chosen = {key: getattr(model, key) for key in CHOICES if getattr(model, key)}
    parts = [key if value is True else f"{key} {getattr(value, 'name', value)}" for key, value in chosen.items()]
    if model.ffn is Ffn.moe:
        parts.append(f"{model.n_expert_per_token} of {model.n_expert} experts, {model.dense_ffn.name}")
    components = ("embedding", "position", "attention", "ffn", "norm", "head")
    sizes = ", ".join(f"{name} {counts[name]:,}" for name in components if counts[name])
    active = f"{counts['active']:,} active for a token, " if counts["idle"] else ""
    active += f"{counts['trained']:,} trained, " if counts["frozen"] else ""
    heads = f"{model.n_head} heads of {model.head_dim}, {model.kv_heads} for keys and values"
    return {
        "model": f"{model.name}: {model.n_layer} layers x {model.n_embd}, {heads}",
        "parts": ", ".join(parts),
        "sequence": f"{model.block_size:,} tokens of a vocabulary of {model.vocab_size:,}",
        "parameters": f"{counts['total']:,}, {active}{counts['non_embedding']:,} without embeddings ({sizes})",
    }


def configuration(record: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """Return the rows of the summary on batch, optimizer, precision and data: label -> text."""
    optim = config.optim
    tokens = record["global_batch"] * record["block_size"]
    steps = f"{record['from_step']} done of {optim.max_steps:,}" if record["from_step"] else f"{optim.max_steps:,}"
    per_rank = f"{counted(record['accumulation'], 'micro-batch', 'micro-batches')} of {record['micro_batch']}"
    saves = str(config.checkpoint.every())
    evaluates = f"every {config.eval.interval} steps" if config.eval.interval else "at the end"
    execution = [
        f"{config.precision.name}{' in TF32' if config.tf32 else ''}",
        *([] if config.float8 is Float8.none else [float8_words(config)]),
        f"compile {config.compile.name}{' fullgraph' if config.compile_fullgraph else ''}",
        f"recompute {config.recompute.name}",
        *(["deterministic"] if config.deterministic else []),
    ]
    names = {ADAMW: "AdamW", MUON: "Muon and AdamW", SCHEDULE_FREE: "schedule-free AdamW"}
    optimizer = names.get(optim.optimizer, optim.optimizer)
    first = record["initialised_from"]
    return {
        "batch": f"{record['global_batch']:,} sequences = {tokens:,} tokens a step; {per_rank} per rank",
        "steps": f"{steps}; {tokens * optim.max_steps:,} tokens in all",
        "optimizer": f"{optimizer}, {describe_schedule(optim)}, "
        f"weight decay {optim.weight_decay:g}, gradients clipped at {optim.grad_clip:g}",
        **({"first weights": first["path"]} if first else {}),
        "execution": ", ".join(execution),
        **({"warning": "; ".join(record["warnings"])} if record.get("warnings") else {}),
        "data": f"{record['data']}, sha256 {record['data_sha256'][:12]}; seed {config.seed}",
        "evaluation": f"{evaluates}, {config.eval.sequences} sequences; checkpoint {saves}",
    }


def hardware(record: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the summary on ranks, hosts, devices and software: label -> text."""
    ranks = record["ranks"]
    hosts = list(dict.fromkeys(rank["host"] for rank in ranks))
    devices = Counter(rank["device_name"] for rank in ranks)
    named = ", ".join(f"{count} x {name}" for name, count in devices.items())
    memory = [rank["memory_gib"] for rank in ranks if "memory_gib" in rank]
    shown = ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else "")
    layout = record["topology"]
    topology = " ".join([layout["strategy"], *(f"{k}={v}" for k, v in layout.items() if isinstance(v, int) and v > 1)])
    threads = f"{counted(ranks[0]['threads'], 'thread')} a rank (OMP_NUM_THREADS, or else all cores)"
    return {
        "ranks": f"{len(ranks)} on {counted(len(hosts), 'host')} ({shown}), {topology}",
        "devices": named + (f", {min(memory):.0f} GiB each" if memory else f", {threads}"),
        "software": ", ".join(f"{k} {v}" for k, v in record["software"].items() if k in ("python", "torch", "cuda")),
    }


def performance(record: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """Return the rows of the summary on performance: label -> text. They have the FLOPs of a step and the shares of the
    parts of the model, the planned memory of a rank, and the peak FLOP/s of the devices. If the peak is known, a last
    row has the tokens/s at this peak."""
    flops, peak, ranks = record["flops_per_token"], record["peak_flops_per_s"], len(record["ranks"])
    step = flops * record["global_batch"] * record["block_size"]
    count = training_flops_per_token(config.model)
    attention, ffn = count.projections + count.attention + count.custom, count.ffn + count.router
    shares = {"attention": attention, "feed-forward": ffn, "output matrix": count.logits}
    shares |= {"adapters": count.adapters} if count.adapters else {}
    where = ", ".join(f"{name} {share / count.palm:.0%}" for name, share in shares.items())
    rows = {
        "arithmetic": f"{flops / 1e9:.4g} GFLOP a token (PaLM convention), {step / 1e12:.4g} TFLOP a step",
        "where": f"{where}; attention to feed-forward {attention / ffn:.2f}" if ffn else where,
        "memory": f"{record['memory_planned_gib']:.3g} GiB a rank in tensors, planned",
    }
    if peak is None:  # a guessed peak would give a wrong MFU
        rows["peak"] = f"of this device in {config.precision.name} unknown, so MFU is unavailable"
        return rows
    product = "tf32" if config.tf32 else config.precision.name
    rows["peak"] = f"{peak / 1e12:,.4g} TFLOP/s a rank, dense {product}; {ranks * peak / 1e12:,.4g} in all"
    rows["upper bound"] = (
        f"{ranks * peak / flops:,.0f} tokens/s, {step / (ranks * peak) * 1000:,.3g} ms a step, at 100 % of the peak; "
        f"at an MFU of 50 % {0.5 * ranks * peak / flops:,.0f} tokens/s"
    )
    return rows


# The file ``run.json``: a whole run in one value, with config, startup, steps, evaluations, checkpoints and summary.
#
# The file depends only on the run folder. So interruptions do not change it, and all tools read a run alike.


FORMAT = 1
WARM_UP_STEPS = 5
"""Number of steps at the beginning of each attempt that do not count in the speeds of a summary. These steps are slow:
they fill caches, choose kernels and compile."""


class RunJson:
    """Writer of ``run.json``. The constructor and ``close`` write the whole file from the content of the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.close()

    def write(self, record: StepRecord) -> None:
        """Do nothing. ``close`` writes the whole file, with this record, from the content of the run folder."""

    def close(self) -> None:
        """Write ``run.json`` from the content of the run folder."""
        write_json(self._folder.run_json, describe_run(self._folder))


def describe_run(folder: RunFolder) -> dict[str, Any]:
    """Return the content of ``run.json``, as plain JSON: config, startup, steps, evaluations, checkpoints and summary
    of a run."""
    records = read_records(folder.metrics(0))
    events = folder.read_events()
    evaluation = ("step", "attempt", "time", "val_loss", "val_bits_per_byte", "tasks")
    kept = set(folders.steps(folder.checkpoints))
    saved = {event["step"]: event for event in saves_that_count(events)}  # a repeated step counts one time
    return {
        "format": FORMAT,
        "run": {
            "name": folder.path.parent.name,
            "point": folder.point,
            "path": str(folder.path),
            "start_time": next((event["time"] for event in events if event["event"] == "started"), None),
        },
        "config": read_mapping(folder.config) if folder.config.exists() else None,
        "startup": read_startup(folder),
        "steps": records,
        "evaluations": [
            {name: record[name] for name in evaluation if name in record} for record in records if "val_loss" in record
        ],
        "checkpoints": [
            {name: saved[step][name] for name in ("step", "attempt", "time", "seconds")} | {"kept": step in kept}
            for step in sorted(saved)
        ],
        "summary": summarize(folder, records, events),
    }


def read_startup(folder: RunFolder) -> dict[str, Any] | None:
    """Return ``environment.json`` of the newest attempt that has one; None if no attempt has one."""
    for attempt in reversed(folder.attempts()):
        known = read_json(folder.environment(attempt))
        if known:
            return known
    return None


def summarize(folder: RunFolder, records: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of a run, name -> value: state, number of attempts and steps, losses, speeds, peak of memory
    and training time of rank 0. Unknown values are left out.

    Speeds are medians over the steps, without the first ``WARM_UP_STEPS`` steps of each attempt. If the run has no
    other steps, all steps count.

    ``records`` are the step records of rank 0, and ``events`` the event log.
    """
    ends = [e["event"] for e in events if e["event"] in ("started", "finished", "stopped", "rank_failed")]
    found: dict[str, Any] = {
        "state": {"started": "running", "rank_failed": "failed"}.get(ends[-1], ends[-1]) if ends else "not started",
        "attempts": len(folder.attempts()),
        "steps": records[-1]["step"] if records else 0,
    }
    if not records:
        return found
    found |= {name: records[-1][name] for name in ("loss", "skipped_steps") if name in records[-1]}
    evaluated = [record for record in records if "val_loss" in record]
    if evaluated:
        best = min(evaluated, key=lambda record: record["val_loss"])
        found |= {
            "val_loss": evaluated[-1]["val_loss"],
            "best_val_loss": best["val_loss"],
            "best_val_step": best["step"],
        }
    # Speeds without the warm-up steps of each attempt; with them if no other steps remain.
    first: dict[int, int] = {}
    for record in records:
        first.setdefault(record["attempt"], record["step"])
    steady = [one for one in records if one["step"] >= first[one["attempt"]] + WARM_UP_STEPS] or records
    shares = ("mfu_palm", "mfu_bf16", "mfu_causal", "hfu")
    for name in ("step_time_s", "tokens_per_s", "tflops_per_s", *shares, "data_wait_s"):
        values = [record[name] for record in steady if name in record]
        if values:
            found[name] = statistics.median(values)
    peaks = [record["memory_peak_gib"] for record in records if "memory_peak_gib" in record]
    if peaks:
        found["memory_peak_gib"] = max(peaks)
    return found | {"training_s": sum(record["step_time_s"] for record in records)}
