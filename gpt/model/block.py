"""One transformer block: the unit that is repeated, and the unit that is sharded from outside.

B batch, T time, D width. Self-contained: takes and gives one tensor, and needs nothing of its neighbours.
"""

from __future__ import annotations

from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.attention import Attention
from gpt.model.cache import LayerCache
from gpt.model.ffn import build_ffn
from gpt.model.norm import build_norm


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream, each normalized before (arXiv 2002.04745)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = build_norm(config)
        self.ffn = build_ffn(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, cache: LayerCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), cache))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
