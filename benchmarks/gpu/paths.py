"""Runs through all code that only a GPU uses, compared with a plain fp32 run on the same device.

    python -m benchmarks.gpu.paths                           # all entries; one GPU is enough
    python -m benchmarks.gpu.paths --only bf16,flash         # entries whose names begin so
    python -m benchmarks.gpu.paths --device cpu --only fsdp  # the same runs without a GPU: gloo, tiny sizes, two ranks

Each entry is a short run of ``gpt.train`` under torchrun, as users start it. The reference is one rank in fp32 with
attention written out, experts multiplied one by one, and nothing compiled. The losses of all steps and the gradient
norm of the first step must be near those of the reference; the table has the tolerance. After each entry the script
writes a dated page and its JSON: hardware, versions, commit, tokens/s, MFU, memory. benchmarks.gpu measures the speed
of a step and its causes. The exit status is 0, 1 if an entry failed or exceeds the tolerance, or 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from gpt.config import TrainConfig, compose_train
from gpt.config.rules import is_importable
from gpt.topology.check_dims import check_parallel_dims
from launch.errors import ConfigError
from launch.runs.compose import to_schema

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
"""Time limit of one entry, in seconds."""
FP32, BF16 = 1e-3, 2e-2
"""Relative tolerances for runs in fp32 and in bf16. They allow for other kernels and other orders of summation in a few
steps.
"""
COMMON = (
    *("logging.tensorboard=false", "logging.gradients_interval=0", "checkpoint.interval=0", "eval.interval=0"),
    "checkpoint.give_up_after_min=0",  # the last step is saved, and a full disk must not keep an entry waiting
    *("optim.warmup_steps=4", "optim.lr=6e-4", "optim.min_lr=6e-5", "optim.global_batch=32"),
)
SIZES = {
    "cuda": ("model.block_size=1024", "eval.sequences=16", "optim.max_steps=20"),
    "cpu": (
        *("model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=32", "model.vocab_size=256"),
        *(
            "model.n_kv_head=null",
            "model.ffn_hidden=64",
            "data.max_bytes=200000",
            "eval.sequences=4",
            "optim.max_steps=6",
        ),
    ),
}
MODELS = {
    "dense": ("model=llama_124m",),
    "experts": ("model=moe_200m",),
}
FP32_WORDS = ("precision=fp32", "tf32=false")
"""Overrides for fp32 arithmetic. Without them a GPU computes in bf16, or rounds the factors of products to TF32."""
PLAIN = ("parallel=ddp", *FP32_WORDS, "model.attention=manual", "compile=none")
ONE_BY_ONE = ("model.expert_matmul=loop",)


@dataclass(frozen=True)
class Entry:
    """One training run of this script: its name, its overrides, and how it is compared with the reference run."""

    name: str
    words: tuple[str, ...]
    tolerance: float = BF16
    model: str = "dense"
    ranks: int = 1
    micro_batch: int = 4
    """Largest number of sequences in a micro-batch."""


@dataclass
class Result:
    """Outcome and measurements of one entry."""

    entry: Entry
    outcome: str
    """``ok``, ``off`` (the error exceeds the tolerance), ``refused`` (the program refused the overrides) or ``failed``.
    """
    why: str = ""
    error: float | None = None
    """Largest relative error of losses and of the first gradient norm against the reference run; None if there is no
    comparison."""
    summary: dict[str, Any] = field(default_factory=dict)
    startup: dict[str, Any] = field(default_factory=dict)


KERNELS = (
    Entry("fp32", FP32_WORDS, FP32),
    Entry("bf16", ("precision=bf16", "compile=none")),
    Entry("flash attention", ("precision=bf16", "model.attention=flash")),
    Entry("compile=default", ("precision=bf16", "compile=default")),
    Entry("compile=reduce-overhead", ("precision=bf16", "compile=reduce-overhead"), micro_batch=32),
    Entry("recompute=selective", ("precision=bf16", "compile=none", "recompute=selective")),
    Entry("recompute=full", ("precision=bf16", "compile=none", "recompute=full")),
    Entry("compile and recompute", ("precision=bf16", "compile=default", "recompute=selective")),
    Entry("deterministic", ("precision=bf16", "deterministic=true")),
    Entry("experts grouped fp32", FP32_WORDS, FP32, "experts"),
    Entry("experts grouped bf16", ("precision=bf16", "compile=none"), BF16, "experts"),
    Entry("experts compile", ("precision=bf16", "compile=default"), BF16, "experts"),
    Entry("experts recompute=selective", ("precision=bf16", "compile=none", "recompute=selective"), BF16, "experts"),
)


def presets(gpus: int) -> Iterator[Entry]:
    """Yield entries for each preset in ``configs/parallel`` that fits ``gpus`` devices, in fp32 and in bf16.

    An entry keeps the sizes of the preset if they fit. Otherwise each dimension of the preset gets two ranks.
    """
    ranks = 1 << (gpus.bit_length() - 1)
    for path in sorted((ROOT / "configs" / "parallel").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        if path.stem == "auto":  # another preset, which the planner chooses
            continue
        if values.get("strategy") == "deepspeed" and not is_importable("deepspeed"):
            continue
        model = "experts" if "ep" in values else "dense"
        shrunk = [key for key in ("dp_shard", "tp", "pp", "cp", "ep") if values.get(key)]
        for size in (None, 2):
            words = (f"parallel={path.stem}", *(f"parallel.{key}={size}" for key in shrunk if size))
            try:
                check_parallel_dims(to_schema(compose_train([*MODELS[model], *words]), TrainConfig), ranks)
            except ConfigError:
                continue
            yield Entry(f"{path.stem} fp32", (*words, *FP32_WORDS), FP32, model, ranks)
            yield Entry(f"{path.stem} bf16", (*words, "precision=bf16", "model.attention=flash"), BF16, model, ranks)
            break


def command(entry: Entry, device: str, folder: Path) -> list[str]:
    """Return the command line that trains an entry on ``device`` (``cuda`` or ``cpu``), with the run folder ``folder``.

    The micro-batch is that of the entry, or all sequences that one data rank gets in a step if these are fewer. Raises
    ConfigError if the training program would refuse the overrides.
    """
    words = [*MODELS[entry.model], *SIZES[device], *COMMON, f"device={device}", *entry.words]
    config = to_schema(compose_train(words), TrainConfig)
    micro = min(entry.micro_batch, config.optim.global_batch // check_parallel_dims(config, entry.ranks).data_ranks)
    words += [f"optim.max_micro_batch={micro}", f"run_dir={folder}", f"data.cache_dir={folder.parent / 'cache'}"]
    # The address is given: that of the host's name may be none.
    starter = [
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={entry.ranks}",
        "-m",
        "gpt.train",
    ]
    return [sys.executable, "-m", *starter, *words]


def run(entry: Entry, device: str, folder: Path) -> Result:
    """Run an entry and wait for its end. Return its outcome and measurements."""
    try:
        words = command(entry, device, folder)
    except ConfigError as error:
        return Result(entry, "refused", f"{error.found}; expected {error.expected}")
    log = folder.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return Result(entry, "failed", f"not done after {LIMIT_S} s")
    finally:  # also if this process gets a signal to end: the entry has a session of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = log.read_text(errors="replace")
    if status:
        refusal = re.search(r"found: (.*)\nexpected: (.*)", text)
        if refusal:
            return Result(entry, "refused", f"{refusal[1]}; expected {refusal[2]}")
        raised = [line for line in text.splitlines() if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
        return Result(entry, "failed", raised[0] if raised else f"exit status {status}")
    told = json.loads((folder / "run.json").read_text())
    losses = [step.get("loss") for step in told["steps"]]
    if None in losses:
        return Result(entry, "failed", f"the loss of step {losses.index(None) + 1} is not finite")
    summary = told["summary"] | {"losses": losses, "grad_norm": told["steps"][0].get("grad_norm", float("nan"))}
    return Result(entry, "ok", summary=summary, startup=told["startup"])


def compare(result: Result, plain: Result) -> None:
    """Set ``result.error`` to the largest relative error against the run ``plain``, and ``result.outcome`` to ``off``
    if the error exceeds the tolerance.
    """
    if not (result.summary and plain.summary):
        return
    pairs = [*zip(result.summary["losses"], plain.summary["losses"], strict=True)]
    pairs.append((result.summary["grad_norm"], plain.summary["grad_norm"]))
    result.error = max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)
    if not result.error <= result.entry.tolerance:
        result.outcome = "off"


def row(result: Result) -> str:
    """Return the line of the Markdown table for a result."""
    entry, summary = result.entry, result.summary
    figures = [
        f"{summary[name] * factor:{form}}" if name in summary else ""
        for name, factor, form in (
            ("step_time_s", 1e3, ".1f"),
            ("tokens_per_s", 1, ",.0f"),
            ("mfu_palm", 1, ".1%"),
            ("mfu_causal", 1, ".1%"),
            ("memory_peak_gib", 1, ".2f"),
        )
    ]
    error = "" if result.error is None else f"{result.error:.1e}"
    cells = [entry.name, str(entry.ranks), error, f"{entry.tolerance:g}", *figures]
    return f"| {' | '.join(cells)} | {result.outcome}{': ' * bool(result.why)}{result.why} |"


def page(results: Sequence[Result], commands: str) -> str:
    """Return the Markdown page with the results. ``commands`` is the command line that was typed."""
    known = next(result.startup for result in results if result.startup)
    ranks = known["ranks"][0]
    versions = ", ".join(f"{name} {version}" for name, version in known["software"].items())
    heads = (
        "entry | ranks | error | tolerance | step, ms | tokens/s | MFU (PaLM) | MFU (causal) | memory, GiB | outcome"
    )
    return "\n".join(
        [
            f"# {ranks['device_name']}, {time.strftime('%Y-%m-%d')}",
            "",
            f"`{commands}`, commit {(known['git'].get('commit') or 'unknown')[:7]}; {versions}.",
            "The error is that of all losses and of the first gradient norm, against one rank in fp32 with attention",
            "written out and experts multiplied one by one.",
            "",
            f"| {heads} |",
            "|---" * heads.count("|") + "|---|",
            *map(row, results),
            "",
        ]
    )


def entries(ranks: int, only: Sequence[str]) -> list[Entry]:
    """Return the entries on ``ranks`` devices whose names begin with a word of ``only``; all entries if ``only`` is
    empty.
    """
    every = [*KERNELS, *presets(ranks)]
    return [e for e in every if not only or any(e.name.startswith(word) for word in only)]


def plain_paths(chosen: Sequence[Entry]) -> list[Entry]:
    """Return the reference entries for the chosen entries: one for each model."""
    names = dict.fromkeys(entry.model for entry in chosen)
    return [Entry(f"plain {name}", PLAIN + ONE_BY_ONE * (name == "experts"), 0, name) for name in names]


def main() -> int:
    """Train all chosen entries and their references. Returns the exit status, which the docstring of the module
    explains."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=list(SIZES), default="cuda", help="cpu rehearses the list with tiny sizes")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="entries whose names begin so; default: all")
    parser.add_argument("--ranks", type=int, default=0, help="of the presets; default: all GPUs, or two on the CPU")
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "gpu" / "results", metavar="FOLDER")
    words = parser.parse_args()
    if words.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here, so nothing is run; --device cpu rehearses the list", file=sys.stderr)
        return 2
    ranks = words.ranks or (2 if words.device == "cpu" else torch.cuda.device_count())
    chosen = entries(ranks, [name for name in words.only.split(",") if name])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an entry is ended, too
    results: list[Result] = []
    plain: dict[str, Result] = {}
    words.to.mkdir(parents=True, exist_ok=True)
    name = f"{words.device}_{time.strftime('%Y-%m-%d_%H%M')}"
    typed = " ".join(["python -m benchmarks.gpu.paths", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="gpu_") as place:
        for entry in (*plain_paths(chosen), *chosen):
            folder = Path(place) / str(len(results))
            result = run(entry, words.device, folder)
            shutil.rmtree(folder, ignore_errors=True)  # a checkpoint of each would fill a disk
            if result.outcome == "failed":
                shutil.copy(folder.with_suffix(".log"), words.to / f"{name}_{len(results)}.log")
            compare(result, plain.setdefault(entry.model, result))
            results.append(result)
            print(row(result), flush=True)
            if any(one.startup for one in results):
                (words.to / f"{name}.md").write_text(page(results, typed))
            (words.to / f"{name}.json").write_text(json.dumps([asdict(one) for one in results], indent=1))
    print(f"written: {words.to / name}.md and .json")
    return 0 if all(result.outcome in ("ok", "refused") for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
