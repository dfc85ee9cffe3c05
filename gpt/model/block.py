"""One transformer block: the unit that is repeated, and the unit that is sharded from outside.

B batch, T time, D width. Self-contained: takes and returns one tensor, and needs nothing of its neighbors.
"""

from __future__ import annotations

from torch import Tensor, nn

from gpt.components.load import build_part
from gpt.config import Ffn, ModelConfig, NormPosition
from gpt.model.attention import Attention
from gpt.model.ffn import build_dense
from gpt.model.kv_cache import LayerCache
from gpt.model.norm import build_norm


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    Each is normalized before (``pre``, arXiv 2002.04745) or the sum is after (``post``, arXiv 1706.03762, section 5.4);
    in parallel both read the same hidden states (arXiv 2204.06745, section 2.1).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = build_attention(config)
        self.ffn_norm = build_norm(config)
        self.ffn = build_ffn(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post = config.norm_position is NormPosition.post
        self.parallel = config.parallel_residual

    def forward(self, x_BTD: Tensor, cache: LayerCache | None = None) -> Tensor:
        if self.post:
            x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, cache)))
            return self.ffn_norm(x_BTD + self.dropout(self.ffn(x_BTD)))
        if self.parallel:
            attended_BTD = self.dropout(self.attention(self.attention_norm(x_BTD), cache))
            return x_BTD + attended_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), cache))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))


def build_attention(config: ModelConfig) -> nn.Module:
    """Build our attention, or the user's, (B, T, D) and a cache or None -> (B, T, D)."""
    if not isinstance(config.attention, str):
        return Attention(config)
    made: nn.Module = build_part("model.attention", config.attention, config)
    return made


def build_ffn(config: ModelConfig) -> nn.Module:
    """Build the feed-forward layer that ``config.ffn`` names, (B, T, D) -> (B, T, D)."""
    from gpt.model.moe import MixtureOfExperts

    if isinstance(config.ffn, str):
        made: nn.Module = build_part("model.ffn", config.ffn, config)
        return made
    return MixtureOfExperts(config) if config.ffn is Ffn.moe else build_dense(config, config.ffn_width)
