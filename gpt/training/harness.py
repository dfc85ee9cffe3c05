"""The weights of a run as a model of lm-eval's harness, which evaluates tasks between two steps (``eval.tasks``).

Shapes: B sequences, T tokens of each, S tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from gpt.config import TrainConfig
from gpt.data.corpus import check_tasks, load_tasks
from gpt.data.tokenizers import Tokenizer
from gpt.model.gpt import Sampling, generate_tokens, make_generators
from gpt.model.layers import autocast
from gpt.parallel.distributed import World
from gpt.parallel.nd import reshard
from gpt.training.loop import EvaluationShare

SEED = 1234
"""Seed with which lm-eval chooses the examples of few-shot requests; lm-eval's default."""


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Return a context that restores the random states of Python, numpy and torch at its end."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


class Harness(TemplateLM):
    """The model of a run as a model of lm-eval's harness, which evaluates tasks.

    Only rank 0 loads the data sets and runs the harness. Every rank computes a part of the requests of the harness. All
    ranks make the same number of forward passes, as a sharded model requires.

    Args:
        module: the model, which returns the logits of all tokens on each rank.
        config: config of the run, with ``eval.tasks``.
        tokenizer: tokenizer of the corpus.
        world: all ranks.

    Raises:
        ConfigError: a task is unknown or cannot be loaded; raised on every rank.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, tokenizer: Tokenizer, world: World) -> None:
        super().__init__()
        self._model: Any = getattr(module, "module", module)  # without DDP, which would prepare a backward pass
        self._config, self._tokenizer, self._world, self._device = config, tokenizer, world, world.device
        self._size, self._vocab = config.model.block_size, min(tokenizer.vocab_size, config.model.vocab_size)

        def load() -> None:
            check_tasks(config.eval.tasks, tokenizer.kind.name)
            with kept_random_states(world.device):
                self._tasks = load_tasks(config.eval.tasks)

        world.on_first(load)

    @torch.no_grad()
    def figures(self, share: EvaluationShare, on_pass: Callable[[], object]) -> dict[str, float]:
        """Evaluate the tasks. Return ``task/metric`` -> value on rank 0, an empty dict on other ranks. Collective.

        The random states of the process do not change, and the requests are the same at each call.

        Args:
            share: largest number of sequences of a forward pass, and the part of the requests that this rank computes.
            on_pass: called before every forward pass.
        """
        self._share, self._on_pass = share, on_pass
        was_training = self._model.training
        self._model.eval()
        # Requests have other lengths than training sequences. Code that is compiled for their lengths could replace the
        # compiled code of training.
        eager = torch.compiler.set_stance("force_eager") if self._config.compiles else nullcontext()
        found: dict[str, float] = {}
        with eager, autocast(self._config, self._device):
            if self._world.is_first:
                found = self._evaluate()
            while (job := self._world.on_first(lambda: None)) is not None:  # type: ignore[func-returns-value]
                self._compute(*job)
        self._model.train(was_training)
        reshard(self._model)
        return found

    def _evaluate(self) -> dict[str, float]:
        """Run the harness. Return ``task/metric`` -> value. Only rank 0 calls this method."""
        with kept_random_states(self._device), redirect_stderr(io.StringIO()):  # lm-eval's progress bars
            random.seed(SEED)
            np.random.seed(SEED)
            for task in self._tasks["tasks"].values():
                task.set_fewshot_seed(SEED)
            results = evaluate(self, self._tasks, bootstrap_iters=0, log_samples=False)["results"]
        return {
            f"{task}/{name.removesuffix(',none')}": value
            for task, metrics in results.items()
            for name, value in metrics.items()
            if isinstance(value, float) and math.isfinite(value)  # neither a count nor a text
        }

    def _request(self, generates: bool, rows: list[Any]) -> list[Any]:
        """Send requests of lm-eval to all ranks, and return one answer for each row, in the order of ``rows``. Only
        rank 0 calls this method.

        Args:
            generates: True for requests to generate text, False for requests of log-probabilities.
            rows: one row for each request. To generate: [ids of the context, lm-eval's settings, seed]; the answer is
                the generated text. Log-probabilities: [ids of context and continuation, number of tokens of the
                continuation]; the answer is (log-probability of the continuation in nats, True if each of its tokens
                is the most likely one).
        """
        self._world.on_first(lambda: (generates, rows))
        return self._compute(generates, rows)

    def _compute(self, generates: bool, rows: list[Any]) -> list[Any]:
        """Compute the answers to this rank's part of ``rows``. Return the answers to all rows, in their order, on every
        rank. Collective."""
        share = self._share
        # Long rows come first. So the rows of a pass have similar lengths, and a lack of memory shows at once.
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
        mine = order[share.part :: share.parts]
        # With a chunked loss, the logits of a whole micro-batch may not fit into memory.
        batch = 1 if generates or self._config.chunked_loss else share.batch
        answers: list[tuple[int, Any]] = []
        for first in range(0, math.ceil(len(rows) / share.parts), batch):
            chosen = mine[first : first + batch]
            # A rank that has no row left computes one again, and drops its answer.
            found = (self._generate if generates else self._score)([rows[row] for row in chosen or order[:1]])
            answers += zip(chosen, found, strict=False)
        by_row = dict(answer for of_rank in self._world.gather(answers) for answer in of_rank)
        return [by_row[row] for row in range(len(rows))]

    def _score(self, rows: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return for each row the log-probability of its continuation in nats, and True if each token of the
        continuation is the most likely one.

        A row has the tokens of context and continuation, and the number of tokens of the continuation. One forward pass
        computes all rows.
        """
        self._on_pass()
        texts = [torch.tensor(ids[-self._size - 1 :], device=self._device) for ids, _ in rows]
        logits_BTV = self._model(pad_sequence(texts, batch_first=True)[:, :-1])
        found = []
        for (_, count), tokens_T, logits_TV in zip(rows, texts, logits_BTV, strict=True):
            end = len(tokens_T) - 1
            place = slice(max(0, end - count), end)
            targets_S, logits_SV = tokens_T[1:][place], logits_TV[place, : self._config.model.vocab_size].float()
            loss = F.cross_entropy(logits_SV, targets_S, reduction="sum").item()
            found.append((-loss, bool((logits_SV.argmax(-1) == targets_S).all())))
        return found

    def _generate(self, rows: Sequence[Any]) -> list[str]:
        """Return the text that the model generates for the only row in ``rows``, as a list of one text. The row has the
        tokens of a context, lm-eval's settings, and a seed.

        Each rank generates tokens until all ranks have finished, because a sharded model needs all ranks in each pass.
        """
        ((ids, options, seed),) = rows
        limit, stops, end = options["max_gen_toks"], options["until"], self._tokenizer.eot
        room = self._size - limit
        prompt_1T = torch.tensor([ids[-room:] if room > 0 else ids], device=self._device)
        sampling = Sampling(options.get("temperature", 0.0), options.get("top_k"), options.get("top_p"))
        text, made = "", []
        for next_B in generate_tokens(self._model, prompt_1T, self._vocab, sampling, make_generators(seed, 1)):
            self._on_pass()
            made += next_B.tolist()
            read = made[: made.index(end) if end in made else limit][:limit]
            text = self._tokenizer.decode(read)
            continues = len(read) == len(made) < limit and not any(stop in text for stop in stops)
            if not self._world.all_reduce(torch.tensor(int(continues), device=self._device)):
                break
        return [postprocess_generated_text(text, stops, None)]

    # Methods that lm-eval calls, on rank 0.

    @property
    def eot_token_id(self) -> int:
        """Id of the token that lm-eval puts before a text: the token that ends documents, or a newline if the tokenizer
        has no such token."""
        return int(self._tokenizer.encode("\n")[-1]) if self._tokenizer.eot is None else self._tokenizer.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, without special tokens. lm-eval passes the other arguments, which are
        ignored."""
        self._on_pass()
        return self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._request(False, [[context + tokens, len(tokens)] for _, context, tokens in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability in nats of the text of each request, computed in windows without overlap."""
        cut = [
            get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, self._size, context_len=1)
            for request in requests
        ]
        windows = [[("", *make_disjoint_window(window)) for window in each] for each in cut]
        scored = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        return [sum(next(scored)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the generated text of each request, up to a stop text or the largest number of tokens."""
        rows = []
        for place, (context, options) in enumerate(request.args for request in requests):
            rows.append([self.tok_encode(context) or [self.eot_token_id], normalize_gen_kwargs(options), place])
        return self._request(True, rows)
