"""Check that this installation trains: seconds on a laptop's CPU, nothing downloaded, nothing left behind.

    python -m gpt.smoke                    # or on a GPU: python -m gpt.smoke device=cuda

Trains the model of 116 thousand parameters on the running Python's own source, resumes it from a checkpoint, and writes
with it. Each line names one check. The exit status is 0 if all checks pass.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gpt.accounting import count
from gpt.checkpoint import folders
from gpt.conversion.state_dict import find_checkpoint, load_model
from gpt.generate import Sampling, generate_tokens, make_generators
from gpt.train import run_ranks
from gpt.training.run import parse_arguments, parse_request
from launch import worker
from launch.errors import CommandParser, refusing
from launch.runs.folder import RunFolder
from launch.runs.records import read_records

STEPS, HALF = 20, 10
WORDS = (
    *("model=tiny_116k", "data=stdlib", "data.max_bytes=200000", "compile=none", "fresh=false"),
    *(f"optim.max_steps={STEPS}", "optim.global_batch=8", "optim.max_micro_batch=8", "optim.lr=1e-2"),
    *("eval.sequences=8", "eval.interval=0", f"checkpoint.interval={HALF}"),
    *("logging.tensorboard=false", "logging.csv=false", "logging.json=false"),
)
FALL = 1.0
"""Smallest fall of the loss over the training steps, in nats per byte. The usual fall is about twice as large."""


class CheckFailedError(Exception):
    """Raised with the observed value when a check fails."""


def checks(overrides: Sequence[str], folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the checks in order: the title of a check, and a function that returns its observation, or raises."""
    words = ["device=cpu", *WORDS, *overrides, f"run_dir={folder / 'run'}", f"output_dir={folder}"]
    state: dict[str, Tensor] = {}

    def training() -> str:
        train_here(words)
        losses = [record["loss"] for record in read_records(RunFolder(folder / "run").metrics(0))]
        require(len(losses) == STEPS, f"{len(losses)} of {STEPS} steps")
        require(losses[0] - losses[-1] > FALL, f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
        return f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {STEPS} steps"

    def saving() -> str:
        model = load_model(folder / "run", STEPS)[1]
        state.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        built = sum(parameter.numel() for parameter in model.parameters())
        require(built == count(model.config).total, f"{built:,} parameters, and {count(model.config).total:,} planned")
        return f"the checkpoint of step {STEPS} is whole: {built:,} parameters, as planned"

    def resuming() -> str:
        folders.remove_folder(find_checkpoint(RunFolder(folder / "run"), STEPS))
        train_here(words)
        starts = [e["from_step"] for e in RunFolder(folder / "run").read_events() if e["event"] == "started"]
        require(starts == [0, HALF], f"starts from steps {starts}")
        again = load_model(folder / "run", STEPS)[1].state_dict()
        differ = [name for name, tensor in state.items() if not torch.equal(tensor, again[name])]
        require(not differ, f"{', '.join(differ)} differ")
        return f"from step {HALF} to {STEPS} again: the same weights, bit for bit"

    def writing() -> str:
        model = load_model(folder / "run", STEPS)[1]
        prompt_BT = torch.tensor([list(b"def ")])
        texts = [
            bytes(
                int(token)
                for token in islice(
                    generate_tokens(model, prompt_BT, 256, Sampling(), make_generators(1, 1), cached), 32
                )
            )
            for cached in (True, False)
        ]
        require(texts[0] == texts[1], f"{texts[0]!r} with a cache of keys and values, {texts[1]!r} without")
        return f"{(b'def ' + texts[0]).decode(errors='replace')!r}, the same with a cache and without"

    yield "training", training
    yield "saving", saving
    yield "resuming", resuming
    yield "writing", writing


def train_here(words: Sequence[str]) -> None:
    """Run ``gpt.train`` with the overrides ``words`` in this process. Raise CheckFailedError unless it finishes."""
    outcome = run_ranks(parse_request(parse_arguments(words)), worker.attach())
    require(outcome == "finished", f"the run {outcome}")


def require(holds: bool, seen: str) -> None:
    """Raise CheckFailedError with ``seen``, the observed value, unless ``holds`` is true."""
    if not holds:
        raise CheckFailedError(seen)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if all checks pass, 1 if one fails, 2 if the command was refused."""
    parser = CommandParser(prog="python -m gpt.smoke", description="Check in seconds that this installation trains.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of configs/train.yaml")
    overrides, started = parser.parse_args(argv).overrides, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpt-smoke-") as temporary:
        for name, check in checks(overrides, Path(temporary)):
            told = io.StringIO()
            try:
                with contextlib.redirect_stdout(told):
                    seen = check()
            except (CheckFailedError, OSError, RuntimeError) as error:
                print(told.getvalue(), end="")
                if not isinstance(error, CheckFailedError):
                    traceback.print_exception(error)
                print(f"FAILED  {name}: {error}", flush=True)
                return 1
            print(f"ok  {name}: {seen}", flush=True)
    print(
        f"python {sys.version.split()[0]}, torch {torch.__version__}: all holds, {time.perf_counter() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
