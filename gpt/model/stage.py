"""A part of a GPT that is run by itself: some consecutive blocks, and what is before the first or after the last.

Owns that every parameter keeps its name, so that a stage is initialized, stored and reported as the whole model is.
Must not know how stages are chosen, or who runs them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from gpt.model.gpt import GPT
from gpt.model.kv_cache import Cache


class Stage(GPT):
    """Takes over parts of a whole GPT. The first stage takes tokens, (B, T) integers; others the stream, (B, T, D).

    The last one gives logits, (B, T, V); others the stream. A tied output matrix is the embedding, so the last stage
    has it as well: the same parameter where both stages lie in one process. Modules that a stage does not have are not
    there; ``blocks`` holds its own ones only, under their numbers in the whole model.

    Args:
        whole: the model whose parts are taken.
        blocks: the numbers of the blocks.
        first: whether it embeds.
        last: whether it has the last norm and the output matrix.
    """

    def __init__(self, whole: GPT, blocks: Iterable[int], first: bool, last: bool) -> None:
        nn.Module.__init__(self)
        self.config, self.first, self.last = whole.config, first, last
        if first or (last and whole.config.tie_embeddings):
            self.token_embedding = whole.token_embedding
        if first:
            self.position, self.dropout = whole.position, whole.dropout
        self.blocks = nn.ModuleList()
        for number in blocks:
            self.blocks.add_module(str(number), whole.blocks[number])
        if last:
            self.norm, self.head = whole.norm, whole.head

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Tokens or stream in, stream or logits out."""
        assert cache is None, "a stage does not generate"
        if self.first:
            x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.logits(x) if self.last else x
