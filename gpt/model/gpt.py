"""GPT from tokens to the next token: transformer blocks, initial weights, the model, pipeline stages, and sampling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gpt.components import load_part, owner_of
from gpt.config import Ffn, LoraConfig, ModelConfig, NormPosition, TrainConfig
from gpt.model.attention import Attention, Cache, Documents, LatentAttention, LayerCache, find_documents, softcap
from gpt.model.ffn import DenseFfn, MixtureOfExperts
from gpt.model.layers import (
    INIT_STD,
    Linear,
    autocast,
    build_norm,
    build_position,
    chunked_loss,
    cross_entropy,
    linear,
    loss_and_gradient,
)
from launch.errors import ConfigError

# Transformer block: the unit that is repeated, and the unit that a strategy shards.
#
# B batch, T time, D width. A block takes and returns one tensor, and depends on no other block.


class Block(nn.Module):
    """Transformer block: attention and feed-forward layer, each added to the residual stream, (B, T, D) -> (B, T, D).

    ``norm_position=pre`` normalizes the input of each (arXiv 2002.04745). ``both`` also normalizes the result of each
    (arXiv 2408.00118, section 2). ``post`` normalizes each sum (arXiv 1706.03762, section 5.4). With
    ``parallel_residual``, attention and feed-forward read the same hidden states (arXiv 2204.06745, section 2.1).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        if isinstance(config.attention, str):
            self.attention = load_part("model.attention", config.attention)(config)
        else:
            self.attention = Attention(config) if config.kv_lora_rank is None else LatentAttention(config)
        self.ffn_norm = build_norm(config)
        if isinstance(config.ffn, str):
            self.ffn = load_part("model.ffn", config.ffn)(config)
        else:
            self.ffn = MixtureOfExperts(config) if config.ffn is Ffn.moe else DenseFfn(config, config.ffn_width)
        twice = config.norm_position is NormPosition.both
        self.attended_norm = build_norm(config) if twice else nn.Identity()
        self.fed_norm = build_norm(config) if twice else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.post = config.norm_position is NormPosition.post
        self.parallel = config.parallel_residual

    def forward(self, x_BTD: Tensor, past: LayerCache | Documents | None = None) -> Tensor:
        if self.post:
            x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, past)))
            return self.ffn_norm(x_BTD + self.dropout(self.ffn(x_BTD)))
        if self.parallel:
            attended_BTD = self.dropout(self.attention(self.attention_norm(x_BTD), past))
            return x_BTD + attended_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        x_BTD = x_BTD + self.dropout(self.attended_norm(self.attention(self.attention_norm(x_BTD), past)))
        return x_BTD + self.dropout(self.fed_norm(self.ffn(self.ffn_norm(x_BTD))))


# Initial weights, as in GPT-2.
#
# Every parameter is drawn on the CPU by its own generator, seeded by the run's seed and the parameter's name. So its
# values do not depend on the order of construction, the device, the sharding, or other parameters. For a sharded model,
# gpt/parallel/modules.py draws one parameter after another and keeps this rank's shard.


Weights = Callable[[str, torch.Size], Tensor]
"""Function from name and shape of a parameter, or of a saved buffer, to its values: the whole tensor, fp32 on the CPU.
"""
RESIDUAL_OUTPUTS = ("attention.output.weight", "ffn.down.weight", "ffn.experts.down", "ffn.shared.down.weight")
"""Ends of the names of the matrices whose results are added to the residual stream."""


def initialize(model: GPT, seed: int) -> None:
    """Set every parameter and buffer of ``model`` to its initial value, in place, on any device.

    Matrices are drawn from a normal distribution with standard deviation ``INIT_STD``; those of ``RESIDUAL_OUTPUTS``
    are scaled by 1 / sqrt(2 n_layer). Gains are 1, biases and sinks 0. Source: Language Models are
    Unsupervised Multitask Learners (Radford et al. 2019), section 2.3,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, and
    https://github.com/openai/gpt-2/blob/master/src/model.py. The position table has the deviation of the matrices, as
    in later GPTs; the code of GPT-2 gives it half the deviation.

    Call this before a strategy wraps or shards the model, because wrappers change the names of parameters.
    """
    weights = initial_weights(model.config, seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(weights(name, tensor.shape))
    model.reset_buffers()


def initial_weights(config: ModelConfig, seed: int) -> Weights:
    """Return the function that returns the initial value of a tensor by its name and shape."""
    return partial(initial_value, config=config, seed=seed)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Return the initial value of the parameter or buffer ``name``, whole, fp32 on the CPU.

    Each expert is drawn by itself, so its values do not depend on the number of experts. Padding rows of the vocabulary
    are 0, and the other rows are the same as without padding. A user's class may provide its own values. Of an adapter
    only the first matrix is random and the second is 0, so that it does not change the result at first.
    """
    own = part_value(name, shape, config, seed)
    if own is not None:
        return own
    # A bias of a layer, or of the balance of experts.
    if name.endswith(("bias", "lora_b", "sinks.weight")):
        return torch.zeros(shape, device="cpu")
    if len(shape) < 2:  # the gain of a norm
        return torch.ones(shape, device="cpu")
    std = INIT_STD / math.sqrt(2 * config.n_layer) if name.endswith(RESIDUAL_OUTPUTS) else INIT_STD
    whole = torch.zeros(shape, device="cpu")
    if name.endswith("lora_a"):  # as in peft
        return nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator_of(name, seed))
    if len(shape) == 3:
        for expert in range(shape[0]):
            whole[expert].normal_(std=std, generator=generator_of(f"{name}.{expert}", seed))
        return whole
    # Drawn in place: a padded copy would be as large again, and this is the largest tensor of many models.
    is_padded = name in ("token_embedding.weight", "head.weight")
    drawn = whole[: config.vocab_size] if is_padded else whole
    drawn.normal_(std=std, generator=generator_of(name, seed))
    return whole


def part_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor | None:
    """Return the initial value of a tensor of the model, if a user's class chooses this value. None if the tensor
    belongs to a built-in part, or if the class leaves the choice to ``gpt``.

    Args:
        name: name of the parameter or buffer in the model.
        shape: shape of the whole tensor.
        config: config of the model, which names the user's classes.
        seed: seed of the run. The random generator that the class gets follows from it and from ``name``.
    """
    owner = owner_of(name, config)
    if owner is None:
        return None
    key, local = owner
    kind = load_part(f"model.{key}", config.custom_parts[key])
    if not hasattr(kind, "initial_value"):
        return None
    value: Tensor | None = kind.initial_value(config, local, shape, generator_of(name, seed))
    assert value is None or value.shape == shape, f"{name}: {tuple(value.shape)} instead of {tuple(shape)}"
    return value


def generator_of(name: str, seed: int) -> torch.Generator:
    """Return a generator on the CPU, seeded by 63 bits that are derived from the run's seed and a parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# The model: tokens to logits of the next token.
#
#     tokens -> token embedding (+ learned position) -> dropout -> n_layer x Block -> norm -> output matrix -> logits
#     Block:    x + attention(norm(x)), then x + ffn(norm(x))      (or norms after the sum, or both in parallel)
#
# Shape letters, here and in every module of this folder; a tensor's name ends in its shape, as in ``x_BTD``:
#
#     B batch   T time   D width   H heads   K key-value heads   C head width   F inner width of the ffn   V vocabulary
#     E experts   R rows of all experts
#
# ``gpt.config.ModelConfig`` chooses each part, and each part has a file of its own. The model does not depend on
# devices, ranks or training: a strategy shards it from outside, block by block, through ``blocks``.
#
#     config = ModelConfig(name="small", n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=256)
#     model = GPT(config)
#     initialize(model, seed=1337)                        # until then the weights are torch's own
#
# For a model too large for one device: construct under ``torch.device("meta")``, shard, call ``to_empty``, and load the
# weights. Then call ``reset_buffers``, since tables cannot be computed on the meta device.


class TiedHead(nn.Module):
    """Output layer with the token embedding's matrix (arXiv 1608.05859).

    The caller passes the matrix at each call. If two modules had the matrix as a parameter, ``to_empty`` would make two
    tensors of it on the meta device.
    """

    def forward(
        self, x_BTD: Tensor, weight_VD: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Compute logits, (B, T, D) -> (B, T, V); or if ``loss`` is given, ``loss(x_BTD, weight_VD)``, ()."""
        return linear(x_BTD, weight_VD) if loss is None else loss(x_BTD, weight_VD)


class Head(Linear):
    """Output layer with a matrix of its own."""

    def forward(self, x_BTD: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Compute logits, (B, T, D) -> (B, T, V); or if ``loss`` is given, ``loss(x_BTD, weight)``, ()."""
        return super().forward(x_BTD) if loss is None else loss(x_BTD, self.weight)


class LoraLinear(Linear):
    """Linear layer with an adapter: W x + alpha / rank B A dropout(x) (LoRA, arXiv 2106.09685, section 4.1).

    W is the weight of the layer, A is ``lora_a`` (rank, I), and B is ``lora_b`` (O, rank). Weight and bias have the
    same names as in a linear layer without an adapter.
    """

    def __init__(self, whole: nn.Linear, lora: LoraConfig) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None)
        self.lora_a = nn.Parameter(torch.empty(lora.rank, whole.in_features))
        self.lora_b = nn.Parameter(torch.zeros(whole.out_features, lora.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.dropout, self.scale = nn.Dropout(lora.dropout), lora.alpha / lora.rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * linear(linear(self.dropout(x), self.lora_a), self.lora_b)


class GPT(nn.Module):
    """Decoder-only transformer (GPT-2; Radford et al. 2019, section 2.3), whose parts the config chooses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.padded_vocab, config.n_embd)
        self.position = build_position(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.of_layer(layer)) for layer in range(config.n_layer))
        # With norms after each addition, the hidden states are already normalized.
        self.norm = nn.Identity() if config.norm_position is NormPosition.post else build_norm(config)
        self.head = TiedHead() if config.tie_embeddings else Head(config.n_embd, config.padded_vocab, bias=False)
        self.pads_logits = False
        """True if the logits include the padding columns of the vocabulary, for a loss that ignores these columns."""
        self.chunk_loss = loss_and_gradient
        """Function that returns the loss of a chunk of logits and its gradient; compiled if the model is compiled."""
        if config.adapted:
            for block in self.blocks:
                for name in config.adapted:
                    block.set_submodule(name, LoraLinear(block.get_submodule(name), config.lora))  # type: ignore[arg-type]
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(config.trains(name))

    def forward(
        self, tokens_BT: Tensor, past: Cache | Documents | None = None, targets_BT: Tensor | None = None
    ) -> Tensor:
        """Compute the logits of the next token at each position, (B, T) integers -> (B, T, V).

        Args:
            tokens_BT: the tokens.
            past: a cache, or the packed documents of the batch. The tokens of a cache come before ``tokens_BT``, which
                are added to it; all of them together are at most ``block_size`` tokens. With packed documents, a token
                attends to its own document only. None means no cache and no packed documents.
            targets_BT: next tokens. If given, the method returns the summed loss, (), instead of logits, and computes
                it in chunks. None returns logits.
        """
        cache = past if isinstance(past, Cache) else None
        start = past.positions if isinstance(past, Documents) else 0 if cache is None else cache.length
        seen = (0 if cache is None else cache.length) + tokens_BT.size(1)
        assert seen <= self.config.block_size, f"{seen} tokens in a model of block_size={self.config.block_size}"
        x_BTD = self.embed(tokens_BT, start)
        for index, block in enumerate(self.blocks):
            x_BTD = block(x_BTD) if past is None else block(x_BTD, past if cache is None else cache.layer(index))
        return self.logits(x_BTD, targets_BT)

    def embed(self, tokens_BT: Tensor, start: int | Tensor = 0) -> Tensor:
        """Compute the hidden states before the first block, (B, T) -> (B, T, D).

        ``start`` is the position of the first token, or the positions of all tokens, (B, T).
        """
        x_BTD = self.token_embedding(tokens_BT)
        if self.config.scale_embedding:
            x_BTD = x_BTD * math.sqrt(self.config.n_embd)
        if self.position is not None:
            x_BTD = self.position(x_BTD, start)
        return self.dropout(x_BTD)

    def logits(self, x_BTD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Compute the logits from the hidden states after the last block, (B, T, D) -> (B, T, V); or with targets the
        summed loss, ()."""
        x_BTD = self.norm(x_BTD)
        tied = [self.token_embedding.weight] if self.config.tie_embeddings else []
        # Call the module, so that hooks and sharding from outside apply.
        if targets_BT is not None:
            vocab_size = self.config.vocab_size
            summed = partial(chunked_loss, targets_BT=targets_BT, vocab_size=vocab_size, evaluate=self.chunk_loss)
            return self.head(x_BTD, *tied, summed)
        logits_BTV = self.head(x_BTD, *tied)
        logits_BTV = logits_BTV if self.pads_logits else logits_BTV[..., : self.config.vocab_size]
        return logits_BTV if self.config.logit_softcap is None else softcap(logits_BTV, self.config.logit_softcap)

    def reset_buffers(self) -> None:
        """Compute the buffers that checkpoints do not contain, such as tables of positions. Needed once after
        ``to_empty``."""
        for module in self.modules():
            reset = getattr(module, "reset_buffers", None)
            if reset is not None and module is not self:
                reset()

    @property
    def has_cache(self) -> bool:
        """True if generation can cache keys and values: unless the attention is a user's class with ``uses_cache =
        False``."""
        return all(getattr(block.attention, "uses_cache", True) for block in self.blocks)


# Pipeline stage: consecutive blocks of a GPT, with its input layers in the first stage and its output layers in the
# last.
#
# Every parameter keeps its name, so a stage is initialized, stored and reported like the whole model.


class Stage(GPT):
    """Pipeline stage: consecutive blocks of a GPT, whose modules it shares.

    The first stage takes tokens, (B, T) integers; later stages take hidden states, (B, T, D). The last stage returns
    logits, (B, T, V); earlier stages return hidden states. If the output matrix is tied, the last stage also has the
    embedding. The attribute ``blocks`` has the blocks of the stage by their numbers in the whole model, so that
    parameters keep their names.

    Args:
        whole: the model whose modules are used.
        blocks: the numbers of the blocks, from 0.
        first: True for the stage with the embedding.
        last: True for the stage with the last norm and the output matrix.
    """

    def __init__(self, whole: GPT, blocks: Iterable[int], first: bool, last: bool) -> None:
        nn.Module.__init__(self)
        self.config, self.first, self.last, self.pads_logits = whole.config, first, last, whole.pads_logits
        if first or (last and whole.config.tie_embeddings):
            self.token_embedding = whole.token_embedding
        if first:
            self.position, self.dropout = whole.position, whole.dropout
        self.blocks = nn.ModuleList()
        for number in blocks:
            self.blocks.add_module(str(number), whole.blocks[number])
        if last:
            self.norm, self.head = whole.norm, whole.head

    def forward(self, x: Tensor, past: Cache | Documents | None = None, targets_BT: Tensor | None = None) -> Tensor:
        """Compute the result of this stage: hidden states (B, T, D), or in the last stage logits (B, T, V). ``x`` has
        tokens (B, T) in the first stage, and hidden states (B, T, D) in later stages.

        ``past`` may be the packed documents of the batch; a cache or targets are not supported.
        """
        assert not isinstance(past, Cache) and targets_BT is None, "a stage neither generates nor computes a loss"
        if self.first:
            x = self.embed(x, 0 if past is None else past.positions)
        for block in self.blocks:
            x = block(x) if past is None else block(x, past)
        return self.logits(x) if self.last else x


def summed_loss(
    module: nn.Module,
    config: TrainConfig,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    device: torch.device,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """Run a forward pass of ``module``, and return its loss in nats, summed over the tokens, ().

    Args:
        module: the model, or a wrapper of it.
        config: config of the run.
        tokens_BT: tokens, on any device.
        targets_BT: next tokens, on any device; those below 0 do not count.
        device: device of the model.
        criterion: returns the summed loss of logits and targets. Unused with a chunked loss, which the model computes.
    """
    targets_BT = targets_BT.to(device, non_blocking=True)
    documents = find_documents(config, targets_BT)
    targets = {"targets_BT": targets_BT} if config.chunked_loss else {}
    with autocast(config, device):
        past = [] if documents is None else [documents]
        result: Tensor = module(tokens_BT.to(device, non_blocking=True), *past, **targets)
    return result if targets else criterion(result, targets_BT)


# Drawing of tokens from the logits, one after another, with a cache of keys and values.


@dataclass(frozen=True)
class Sampling:
    """Settings of the random choice of a token from the logits."""

    temperature: float = 1.0
    """Divisor of the logits. Below 1, likely tokens become more likely; 0 always chooses the most likely token."""
    top_k: int | None = None
    """Number of the most likely tokens to draw from; None draws from all tokens."""
    top_p: float | None = None
    """Draw from the smallest set of most likely tokens that together have at least this probability (nucleus sampling,
    arXiv 1904.09751); None draws from all tokens."""

    def validate(self) -> None:
        """Raise ConfigError if a number is out of its range."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"--temperature {self.temperature}", "0 or above", "--temperature 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k {self.top_k}", "1 or above", "--top-k 50")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}", "above 0, up to 1", "--top-p 0.9")


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the probability with which each token of the vocabulary is drawn next, (B, V).

    It is the softmax of the logits divided by the temperature. Tokens outside of ``top_k`` and ``top_p`` have
    probability 0, and the others add up to 1. With temperature 0, the most likely token has probability 1.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.size(1):
        least_B1 = logits_BV.topk(sampling.top_k, dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -math.inf)
    probabilities_BV = logits_BV.softmax(1)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(1, descending=True)
        # Keep a token if the tokens before it have too little probability, so the likeliest always stays.
        kept_BV = sorted_BV.cumsum(1) - sorted_BV < sampling.top_p
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter_(1, order_BV, sorted_BV * kept_BV)
        probabilities_BV /= probabilities_BV.sum(1, keepdim=True)
    return probabilities_BV


def make_generators(seed: int, count: int) -> list[torch.Generator]:
    """Return ``count`` random generators with seeds that follow from ``seed``: one for each sequence, so that the
    random numbers of a sequence do not depend on the number of sequences."""
    return [torch.Generator("cpu").manual_seed((seed * 1000 + i) % 2**63) for i in range(count)]


@torch.no_grad()
def generate_tokens(
    model: GPT,
    prompt_BT: Tensor,
    vocab_size: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, (B,) on the CPU, in an endless loop.

    The model gets at most ``block_size`` tokens, the last ones of a longer text. When this window is full, only its
    last half is kept. So the cache is refilled once per ``block_size / 2`` tokens, not for every token.

    Args:
        model: the model, in eval mode.
        prompt_BT: prompts of equal length, on the model's device.
        vocab_size: number of ids that may be drawn. An embedding may have more rows than the tokenizer has ids.
        sampling: settings of the random choice.
        generators: a generator for each sequence.
        use_cache: True to cache keys and values; False to recompute every token at each step.
    """
    size = model.config.block_size
    tokens_BT, start, read = prompt_BT, max(0, prompt_BT.size(1) - size), 0
    use_cache = use_cache and model.has_cache
    cache = Cache(size)
    while True:
        if tokens_BT.size(1) - start > size:
            start, cache = tokens_BT.size(1) - max(1, size // 2), Cache(size)
        read = start + cache.length if use_cache else start  # first token that the cache lacks
        logits_BTV = model(tokens_BT[:, read:], cache if use_cache else None)
        # Draw on the CPU, so that a seed gives the same tokens whatever the device of the model is.
        chances_BV = probabilities(logits_BTV[:, -1, :vocab_size].float(), sampling).cpu()
        next_B = torch.cat(
            [torch.multinomial(row, 1, generator=own) for row, own in zip(chances_BV, generators, strict=True)]
        )
        tokens_BT = torch.cat([tokens_BT, next_B[:, None].to(tokens_BT.device)], 1)
        yield next_B
