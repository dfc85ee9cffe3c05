"""Generate text with a trained model: ``python -m gpt.generate RUN -p "..."``.

    python -m gpt.generate outputs/quick_test/default -p "def main("
    python -m gpt.generate RUN -p "once" -p "twice" --max-new-tokens 200 --temperature 0.8 --top-k 50 --top-p 0.95

The command only reads the run folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from gpt.checkpoint import step_of
from gpt.config import Device, TrainConfig
from gpt.conversion.state_dict import find_checkpoint, open_run, read_weights
from gpt.data.tokenizers import Tokenizer, load_tokenizer
from gpt.model.gpt import GPT, Sampling, generate_tokens, make_generators
from gpt.model.layers import autocast
from gpt.parallel.distributed import choose_device
from launch.errors import CommandParser, ConfigError, refusing, require_positive

UNFINISHED = "\ufffd"
"""Character that a tokenizer returns in place of a character of which some bytes are still missing."""


class Text:
    """Decodes the tokens of one sequence one after another, and calls ``on_text`` with each part of the text as soon as
    it is complete."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._shown = 0
        self.ids: list[int] = []
        """Tokens that were added, without the token that ends a document."""
        self.ended = False
        """True after the token that ends a document was added."""

    def add(self, token: int) -> None:
        """Add a token, and pass text that is now complete to ``on_text``. Ignore tokens after the end of a document."""
        self.ended = self.ended or token == self._tokenizer.eot
        if not self.ended:
            self.ids.append(token)
            self._pass_on(finished=False)

    def close(self) -> None:
        """Pass the remaining text to ``on_text``, also if its last character is incomplete."""
        self._pass_on(finished=True)

    def _pass_on(self, finished: bool) -> None:
        text = self._tokenizer.decode(self.ids)  # all ids again: the text of a token may depend on the tokens before
        text = text if finished else text.rstrip(UNFINISHED)
        if len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)


def encode_prompt(tokenizer: Tokenizer, prompt: str, block_size: int) -> list[int]:
    """Return the tokens of a prompt. For an empty prompt, return the token that ends documents, because a new document
    begins after it.

    Print a warning if there are more than ``block_size`` tokens.

    Raises:
        ConfigError: the tokenizer lacks a character, or the prompt is empty and there is no such token.
    """
    ids = [int(i) for i in tokenizer.encode(prompt)]
    if not ids and tokenizer.eot is None:
        raise ConfigError("an empty prompt", "text, since this tokenizer has no token to begin with", '-p "\n"')
    if len(ids) > block_size:
        print(f"the prompt has {len(ids)} tokens: the model sees the last {block_size}", file=sys.stderr)
    return ids or [int(tokenizer.eot or 0)]


def little_training(model: GPT, config: TrainConfig, checkpoint: Path) -> str:
    """Return a warning, as text, if a model has trained on fewer tokens than it has parameters; otherwise return "".

    Return "" also for a run that has begun with trained weights, and for a run with ``optim.weak_scaling``, whose
    number of tokens is not known from its steps.
    """
    tokens = step_of(checkpoint) * config.optim.global_batch * config.model.block_size
    share = tokens / sum(parameter.numel() for parameter in model.parameters())
    if share >= 1 or config.init_from is not None or config.optim.weak_scaling:
        return ""
    return f": only {tokens:,} tokens of training, {share:.2g} for each parameter, so expect noise"


def write(
    model: GPT, config: TrainConfig, tokenizer: Tokenizer, prompts: Sequence[str], args: argparse.Namespace
) -> None:
    """Generate ``args.samples`` texts from every prompt, and print them. If there is only one text in all, it is
    printed token by token. Otherwise the texts of a prompt are printed when all of them are complete. The speed is
    printed to standard error.

    The texts of a prompt are one batch, because a batch and its cache need sequences of equal length.
    """
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    sampling.validate()
    device = next(model.parameters()).device
    size = min(tokenizer.vocab_size, config.model.vocab_size)  # ids above those of the tokenizer have no text
    encoded = [encode_prompt(tokenizer, prompt, config.model.block_size) for prompt in prompts]
    generators = make_generators(args.seed, len(prompts) * args.samples)
    is_single = len(generators) == 1
    shown, made, started = 0, 0, time.perf_counter()
    for prompt, ids in zip(prompts, encoded, strict=True):
        if is_single:
            print(prompt, end="", flush=True)
        parts: list[list[str]] = [[] for _ in range(args.samples)]
        texts = [Text(tokenizer, partial(print, end="", flush=True) if is_single else part.append) for part in parts]
        prompt_BT = torch.tensor([ids] * args.samples, device=device)
        own, generators = generators[: args.samples], generators[args.samples :]
        with autocast(config, device):
            for next_B in islice(generate_tokens(model, prompt_BT, size, sampling, own), args.max_new_tokens):
                for text, token in zip(texts, next_B.tolist(), strict=True):
                    text.add(token)
                if all(text.ended for text in texts):
                    break
        for text, part in zip(texts, parts, strict=True):
            text.close()
            made, shown = made + len(text.ids), shown + 1
            print("" if is_single else f"--- {shown}\n{prompt}{''.join(part)}")
    seconds = time.perf_counter() - started
    print(f"{made} tokens in {seconds:.2f} s: {made / seconds:.1f} tokens/s on {device}", file=sys.stderr)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 2 if the command was refused, 130 after Ctrl-C."""
    parser = CommandParser(prog="python -m gpt.generate", description="Let a trained model continue a text.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("-p", "--prompt", action="append", required=True, help="the beginning; can be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to add (default 100)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 always takes the likeliest token (default 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of P together")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of step N; default: the newest")
    parser.add_argument("--device", choices=[d.name for d in Device], default="auto")
    args = parser.parse_args(argv)
    try:
        require_positive("--max-new-tokens", args.max_new_tokens)
        require_positive("--samples", args.samples)
        folder, config = open_run(args.run)
        tokenizer = load_tokenizer(folder.tokenizer)
        checkpoint = find_checkpoint(folder, args.step)
        model = read_weights(config, checkpoint, choose_device(Device[args.device], 0, 1))
        little = little_training(model, config, checkpoint)
        print(f"{config.model.name}, step {step_of(checkpoint)}{little}", file=sys.stderr)
        write(model, config, tokenizer, args.prompt, args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
