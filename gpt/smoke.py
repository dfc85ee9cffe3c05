"""Check that this installation trains: seconds on a laptop's CPU, nothing downloaded, nothing left behind.

    python -m gpt.smoke                    # or on a GPU: python -m gpt.smoke device=cuda

Trains the model of 116 thousand parameters on the running Python's own source, resumes it from a checkpoint, and
generates text with it. Each printed line names one check. The exit status is 0 if all checks pass.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from gpt import checkpoint as folders
from gpt.accounting import count
from gpt.conversion.state_dict import find_checkpoint, load_model
from gpt.model.gpt import Sampling, generate_tokens, make_generators
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
    "logging.tensorboard=false",
)
FALL = 1.0
"""Number of nats per byte by which the loss must fall during training. Usually the loss falls about twice as much."""


class CheckFailedError(Exception):
    """A check has failed. The message describes the observation."""


def require(holds: bool, seen: str) -> None:
    """Raise CheckFailedError with the text ``seen``, a description of the observation, unless ``holds`` is true."""
    if not holds:
        raise CheckFailedError(seen)


def checks(overrides: Sequence[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Make the checks in order, with a run in ``folder``. For each check that passes, yield its name and text on the
    observation. ``overrides`` are added to those of the run.

    Raises:
        CheckFailedError: a check fails.
    """
    words = ["device=cpu", *WORDS, *overrides, f"run_dir={folder / 'run'}", f"output_dir={folder}"]
    run = RunFolder(folder / "run")

    train_here(words)
    losses = [record["loss"] for record in read_records(run.metrics(0))]
    fall = 1 - losses[-1] / losses[0]
    text = f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps, {fall:.1%} less"
    require(len(losses) == STEPS and losses[0] - losses[-1] > FALL, text)
    yield "training", text

    model = load_model(run.path, STEPS)[1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    built, planned = sum(parameter.numel() for parameter in model.parameters()), count(model.config).total
    require(built == planned, f"{built:,} parameters, and {planned:,} planned")
    yield "saving", f"the checkpoint of step {STEPS} is whole: {built:,} parameters, as planned"

    folders.remove_folder(find_checkpoint(run, STEPS))
    train_here(words)
    starts = [event["from_step"] for event in run.read_events() if event["event"] == "started"]
    require(starts == [0, HALF], f"starts from steps {starts}")
    model = load_model(run.path, STEPS)[1]
    differ = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    require(not differ, f"{', '.join(differ)} differ")
    yield "resuming", f"from step {HALF} to {STEPS} again: the same weights, bit for bit"

    prompt_BT = torch.tensor([list(b"def ")])
    cached, plain = (
        bytes(
            int(token)
            for token in islice(generate_tokens(model, prompt_BT, 256, Sampling(), make_generators(1, 1), cache), 32)
        )
        for cache in (True, False)
    )
    require(cached == plain, f"{cached!r} with a cache of keys and values, {plain!r} without")
    yield "writing", f"{(b'def ' + cached).decode(errors='replace')!r}, the same with a cache and without"


def train_here(words: Sequence[str]) -> None:
    """Run ``gpt.train`` with the overrides ``words`` in this process. Print its output only if the run fails.

    Raises:
        CheckFailedError: the run has not finished.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            outcome = run_ranks(parse_request(parse_arguments(words)), worker.attach())
        require(outcome == "finished", f"the run {outcome}")
    except (CheckFailedError, OSError, RuntimeError):
        print(told.getvalue(), end="")
        raise


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0 if all checks pass, 1 if one fails, 2 if the command was refused."""
    parser = CommandParser(prog="python -m gpt.smoke", description="Check in seconds that this installation trains.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of configs/train.yaml")
    overrides, started = parser.parse_args(argv).overrides, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpt-smoke-") as temporary:
        try:
            for name, seen in checks(overrides, Path(temporary)):
                print(f"ok  {name}: {seen}", flush=True)
        except (CheckFailedError, OSError, RuntimeError) as error:
            if not isinstance(error, CheckFailedError):
                traceback.print_exception(error)
            print(f"FAILED: {error}", flush=True)
            return 1
    print(
        f"python {sys.version.split()[0]}, torch {torch.__version__}: all holds, {time.perf_counter() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
