"""Show that two checkouts behave alike: the text of six plans, and the losses of short 2-rank runs, compared exactly.

    git worktree add ../before COMMIT
    python benchmarks/same_results.py ../before .            # exit status 1 and a diff where anything differs

For refactorings, which must change nothing: run it with the checkout from before and the one from after. Both use the
packages of the interpreter that runs this script.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

H100 = ("cluster=slurm", "cluster.gpus_per_node=8", "cluster.gpu_name=NVIDIA H100 80GB HBM3", "dry_run=true")
PLANS = {
    "sweep here": ("-m", "nodes=1,2,4", "cluster=local", "dry_run=true"),
    "gpt2 fsdp": ("-m", "nodes=1,2,4", "model=gpt2_124m", "optim=gpt2", "parallel=fsdp", *H100),
    "llama tp": ("nodes=4", "model=llama_1p3b", "optim=gpt2", "parallel=fsdp_tp", *H100),
    "llama auto": ("nodes=4", "model=llama_1p3b", "optim=gpt2", "parallel=auto", *H100),
    "experts": (
        "-m",
        "nodes=1,2",
        "model=moe_200m",
        "optim=gpt2",
        "parallel=ep",
        "cluster.price_per_gpu_hour=2.5",
        *H100,
    ),
    "zero3 pipelines": ("-m", "nodes=2", "model=gpt2_124m", "optim=gpt2", "parallel=zero3,ds_pp,pp", *H100),
}
"""Command lines of ``python -m launch``."""

LAYOUTS = ("ddp", "fsdp", "pp", "zero2")
TINY = (
    "model.n_layer=2", "model.n_embd=64", "model.n_head=4", "model.n_kv_head=2", "model.block_size=32",
    "data.max_bytes=200000", "optim.global_batch=8", "optim.micro_batch=2", "optim.max_steps=12", "eval.sequences=6",
    "eval.interval=6", "checkpoint.interval=6",
)  # fmt: skip
FIGURES = ("step", "loss", "grad_norm", "lr", "val_loss", "tokens", "samples")


def run(command: list[str], checkout: Path, folder: Path) -> str:
    """Run a command of a checkout in ``folder``; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    text = (
        done.stdout.replace(sys.executable, "PYTHON").replace(str(folder), "FOLDER").replace(str(checkout), "CHECKOUT")
    )
    return f"exit status {done.returncode}\n{text}" if done.returncode else text


def plans(checkout: Path) -> dict[str, str]:
    """The dry runs of a checkout, as they are printed."""
    found = {}
    for name, args in PLANS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(["-m", "launch", *args], checkout, Path(folder))
    return found


def losses(checkout: Path, layout: str) -> str:
    """The step records of a 2-rank run, without what depends on the clock."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["-m", "gpt.train", f"parallel={layout}", "run_dir=run", *TINY]
        printed = run(
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *args], checkout, Path(folder)
        )
        files = sorted(Path(folder, "run", "metrics").glob("rank_*.jsonl"))
        if len(files) != 2:
            return printed
        lines = []
        for file in files:
            for line in file.read_text().splitlines():
                record = json.loads(line)
                lines.append(f"{file.name} {json.dumps({key: record.get(key) for key in FIGURES})}")
        return "\n".join(lines)


def main() -> int:
    """Exit status: 0 all is the same, 1 something differs."""
    parser = argparse.ArgumentParser(description="Show that two checkouts behave alike.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--plans-only", action="store_true", help="leave the runs out")
    args = parser.parse_args()
    before, after = args.before.absolute(), args.after.absolute()
    old, new = plans(before), plans(after)
    pairs = {f"plan: {name}": (old[name], new[name]) for name in PLANS}
    if not args.plans_only:
        pairs |= {f"losses: {layout}": (losses(before, layout), losses(after, layout)) for layout in LAYOUTS}
    differs = False
    for name, (one, other) in pairs.items():
        print(f"{name}: {'the same' if one == other else 'DIFFERS'} ({len(one.splitlines())} lines)")
        if one != other:
            differs = True
            print("\n".join(difflib.unified_diff(one.splitlines(), other.splitlines(), "before", "after", lineterm="")))
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
