"""Stage of a GPT that is run by itself: consecutive blocks, and what is before the first or after the last of them.

Every parameter keeps its name, so that a stage is initialized, stored and reported as the whole model is. Must not know
how stages are chosen, or who runs them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from gpt.model.gpt import GPT
from gpt.model.kv_cache import Cache


class Stage(GPT):
    """Stage made of parts of a whole GPT, which it shares with it.

    The first stage takes tokens, (B, T) integers, the others hidden states, (B, T, D). The last one returns logits,
    (B, T, V), the others hidden states. A tied output matrix is the embedding, so the last stage has it as well: the
    same parameter where both stages are in one process. Modules of other stages are not there; ``blocks`` holds this
    stage's blocks only, under their numbers in the whole model.

    Args:
        whole: the model whose parts are taken.
        blocks: the numbers of the blocks.
        first: True for the stage with the embedding.
        last: True for the stage with the last norm and the output matrix.
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
        """Compute hidden states or logits from tokens or hidden states."""
        assert cache is None, "a stage does not generate"
        if self.first:
            x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.logits(x) if self.last else x
