"""The GPT: tokens in, logits of the next token out.

    tokens -> token embedding (+ learned position) -> dropout -> n_layer x Block -> norm -> output matrix -> logits
    Block:    x + attention(norm(x)), then x + ffn(norm(x))      (gpt/model/block.py; norms after, or both in parallel)

Shape letters, here and in every module of this folder; a tensor's name ends in its shape, as in ``x_BTD``:

    B batch   T time   D width   H heads   K key-value heads   C head width   F inner width of the ffn   V vocabulary
    E experts   R rows given to experts

Each part is chosen by ``gpt.config.ModelConfig`` and lives in a file of its own. Nothing here knows of devices, ranks
or training: a strategy shards the model from outside, block by block, through ``blocks``.

    config = ModelConfig(name="small", n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=256)
    model = GPT(config)
    initialize(model, seed=1337)                        # gpt/model/init.py; until then the weights are torch's own

Too large for one device: construct under ``torch.device("meta")``, shard, ``to_empty``, then load the weights and call
``reset_buffers``, since a table that was never on a device cannot have been computed there.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import ModelConfig, NormPosition
from gpt.model.block import Block
from gpt.model.kv_cache import Cache
from gpt.model.norm import build_norm
from gpt.model.position import build_position


class TiedHead(nn.Module):
    """Output layer with the token embedding's matrix (arXiv 1608.05859).

    The matrix is passed at each call: if two modules owned it, ``to_empty`` of a model on the meta device would make it
    two tensors.
    """

    def forward(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Compute logits, (B, T, D) -> (B, T, V)."""
        return F.linear(x_BTD, weight_VD)


class GPT(nn.Module):
    """Decoder-only transformer (GPT-2; Radford et al. 2019, section 2.3) with exchangeable parts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.padded_vocab, config.n_embd)
        self.position = build_position(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # Norms after each addition leave the hidden states normalized.
        self.norm = build_norm(config) if config.norm_position is NormPosition.pre else nn.Identity()
        self.head = TiedHead() if config.tie_embeddings else nn.Linear(config.n_embd, config.padded_vocab, bias=False)

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute the logits of the token after each position, (B, T) integers -> (B, T, V).

        With a cache (gpt/model/kv_cache.py), the T tokens follow those in it, and are added to it. The tokens seen are
        at most ``block_size`` in all.
        """
        start = 0 if cache is None else cache.length
        seen = start + tokens_BT.size(1)
        assert seen <= self.config.block_size, f"{seen} tokens in a model of block_size={self.config.block_size}"
        x_BTD = self.embed(tokens_BT, start)
        for index, block in enumerate(self.blocks):
            x_BTD = block(x_BTD) if cache is None else block(x_BTD, cache.layer(index))
        return self.logits(x_BTD)

    def embed(self, tokens_BT: Tensor, start: int = 0) -> Tensor:
        """Compute the hidden states before the first block, (B, T) -> (B, T, D); the first token is at ``start``."""
        x_BTD = self.token_embedding(tokens_BT)
        if self.position is not None:
            x_BTD = self.position(x_BTD, start)
        return self.dropout(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Compute the logits from the hidden states after the last block, (B, T, D) -> (B, T, V)."""
        x_BTD = self.norm(x_BTD)
        tied = [self.token_embedding.weight] if self.config.tie_embeddings else []
        logits_BTV = self.head(x_BTD, *tied)  # a call of the module, so that hooks and sharding from outside apply
        return logits_BTV[..., : self.config.vocab_size]

    def reset_buffers(self) -> None:
        """Compute the tables that no checkpoint holds; needed once after ``to_empty``."""
        for module in self.modules():
            reset = getattr(module, "reset_buffers", None)
            if reset is not None and module is not self:
                reset()

    @property
    def has_cache(self) -> bool:
        """True unless the attention says, by ``uses_cache = False``, that it forgets keys and values."""
        return all(getattr(block.attention, "uses_cache", True) for block in self.blocks)
