"""Evaluate a trained model on its validation split: ``python -m gpt.evaluate RUN``.

    python -m gpt.evaluate outputs/quick_test/default                    # the whole split, newest checkpoint
    python -m gpt.evaluate RUN --sequences 500 --step 40 --device cpu
    torchrun --nproc-per-node 8 -m gpt.evaluate RUN                      # the ranks share the sequences
    python -m gpt.evaluate RUN --tasks hellaswag tasks/own.yaml          # tasks of lm-eval, too (the extra eval)

The command only reads the run folder.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from gpt.checkpoint import read_manifest, step_of
from gpt.config import Device, TrainConfig
from gpt.conversion.state_dict import find_checkpoint, open_run, read_weights
from gpt.data.loader import Samples
from gpt.data.prepared import find_document_end
from gpt.data.tokenizers import load_tokenizer
from gpt.model.gpt import summed_loss
from gpt.parallel.distributed import World, open_world
from gpt.training.loop import EvaluationShare, mean_loss
from gpt.training.run import prepare_tokens
from launch.errors import CommandParser, ConfigError, refusing


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on the validation split."""

    run: str
    """Path of the run folder."""
    step: int
    """Step of the checkpoint."""
    sequences: int
    """Number of evaluated sequences."""
    tokens: int
    """Number of evaluated tokens."""
    num_bytes: float | None
    """Estimated bytes of the evaluated text; None if the tokens are no text, or the size of their text is unknown."""
    logged_sequences: int
    """Number of sequences over which training computes ``val_loss``: the first ``eval.sequences`` of the split."""
    loss: float
    """Mean cross-entropy, in nats per token."""
    perplexity: float
    """Exponential of ``loss``."""
    bits_per_byte: float | None
    """Loss in bits per byte of text, which can be compared between tokenizers (The Pile, arXiv 2101.00027, section
    3.1); None if ``num_bytes`` is None."""
    tasks: dict[str, float]
    """``task/metric`` -> value, for tasks of lm-eval."""


def evaluate_run(
    path: Path,
    world: World,
    step: int | None,
    sequences: int | None,
    tasks: Sequence[str] = (),
    *,
    shows_progress: bool = False,
) -> Evaluation:
    """Evaluate a checkpoint of a run on its validation split. Return the metrics. Collective.

    Args:
        path: the run folder.
        world: the ranks that share the sequences.
        step: step of the checkpoint; None takes the newest one.
        sequences: number of sequences, the first ones of the split; None takes all.
        tasks: names of tasks of lm-eval, or YAML files.
        shows_progress: True to show a bar on standard error.

    Raises:
        ConfigError: the run, checkpoint or corpus is missing, the corpus has fewer sequences, or a task is unknown.
    """
    folder, config = open_run(path)
    config.eval.tasks = list(tasks)
    config.eval.validate()
    checkpoint = world.on_first(lambda: find_checkpoint(folder, step))
    samples, wanted = open_validation(config, checkpoint, world, sequences)
    model = read_weights(config, checkpoint, world.device)
    share = EvaluationShare(wanted, config.optim.max_micro_batch, world.rank, world.size)
    rounds = math.ceil(math.ceil(share.sequences / share.parts) / share.batch)
    shown = shows_progress and world.is_first
    # On a terminal, the bar changes every half second, or after each slow batch; a log gets a line every 10 seconds.
    every_s = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(desc="evaluate", total=rounds, unit="batch", miniters=1, mininterval=every_s, disable=not shown) as bar:

        def counted_loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
            summed = summed_loss(model, config, tokens_BT, targets_BT, device=world.device)
            if shown:
                summed.item()  # waits for a GPU, so that counted sequences are finished
                bar.update()
            return summed

        loss = mean_loss(model, counted_loss, samples, world, share)
    figures: dict[str, float] = {}
    if tasks:
        from gpt.training.harness import Harness  # slow to import

        figures = Harness(model, config, load_tokenizer(folder.tokenizer), world).figures(share, lambda: None)
    num_tokens = wanted * config.model.block_size
    num_bytes = samples.val_bytes(wanted)
    return Evaluation(
        run=str(folder.path),
        step=step_of(checkpoint),
        sequences=wanted,
        tokens=num_tokens,
        num_bytes=num_bytes,
        logged_sequences=config.eval.sequences,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=samples.val_bits_per_byte(loss, wanted),
        tasks=figures,
    )


def open_validation(config: TrainConfig, checkpoint: Path, world: World, sequences: int | None) -> tuple[Samples, int]:
    """Return the samples of the corpus on which the model in ``checkpoint`` was trained, and the number of validation
    sequences to evaluate. This is ``sequences``, or the number of all sequences if ``sequences`` is None. Collective.

    Raises:
        ConfigError: the corpus has changed, or has fewer sequences.
    """
    tokens = world.on_first(lambda: prepare_tokens(config))
    # The validation split of another text may contain training text of the model.
    trained_on = read_manifest(checkpoint).meta["data_sha256"]
    if tokens.sha256 != trained_on:
        raise ConfigError(
            f"a corpus (sha256 {tokens.sha256[:12]}...) that is not the one of the run ({trained_on[:12]}...)",
            "the text the model was trained on, since the validation split is its end",
            "the original file put back, or gpt.train again with this one",
        )
    end = find_document_end(config.data, tokens)
    samples = Samples(tokens, config.model.block_size, config.seed, document_end=end)
    wanted = samples.num_val if sequences is None else sequences
    if not 0 < wanted <= samples.num_val:
        raise ConfigError(
            f"--sequences {wanted}", f"1 to {samples.num_val}, all there are", f"--sequences {samples.num_val}"
        )
    return samples, wanted


def format_evaluation(found: Evaluation) -> str:
    """Return the metrics as text of several lines."""
    size = "" if found.num_bytes is None else f", {found.num_bytes:,.0f} bytes"
    bits = "unknown" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    logged = found.logged_sequences
    note = f"\nThe training log has the loss of the first {logged:,} sequences; --sequences {logged} compares with it."
    return (
        f"{found.run}, step {found.step}\n"
        f"validation split: {found.sequences:,} sequences, {found.tokens:,} tokens{size}\n"
        f"loss {found.loss:.4f} nats per token   perplexity {found.perplexity:.4g}   bits per byte {bits}"
        f"{note if logged != found.sequences else ''}"
        + "".join(f"\n{name} {value:.4f}" for name, value in found.tasks.items())
    )


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 if the command was refused."""
    parser = CommandParser(
        prog="python -m gpt.evaluate",
        description="Loss, perplexity and bits per byte of a run on its validation split.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of step N; default: the newest")
    parser.add_argument("--sequences", type=int, metavar="N", help="the first N sequences; default: the whole split")
    parser.add_argument("--tasks", nargs="+", default=(), metavar="TASK", help="tasks of lm-eval, or YAML files")
    parser.add_argument("--device", choices=[d.name for d in Device], default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    with open_world(Device[args.device], timeout_s=600) as world:
        found = evaluate_run(args.run, world, args.step, args.sequences, args.tasks, shows_progress=not args.json)
        if world.is_first:
            print(json.dumps(asdict(found)) if args.json else format_evaluation(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
