"""Turn conversations into tokens with the chat template of a tokenizer. Only the tokens of the assistant's answers
count in the loss. To mark them, a stored token has two parts: the low bits are its id, and the high bits are its kind,
answer or other text (``gpt.data.prepared.KIND_BIT``).

    messages -> text and places of answers -> tokens with kinds, in sequences -> token files -> targets of the loss

Imports no torch. The template is rendered in the sandbox of jinja2, with the variables, functions and filters that
transformers gives to a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import partial
from itertools import accumulate

import numpy as np
from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node, Output, TemplateData
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpt.data.prepared import CONTEXT, KIND_BIT, NEW_DOCUMENT
from gpt.data.shards import Piece, readable
from gpt.data.tokenizers import HfTokenizer, Ids, Tokenizer
from launch.errors import ConfigError

ROLES = ("system", "user", "assistant")
SIGN = "\ufdd0"
"""Character that is inserted before and after each answer to find it in the rendered text. Unicode assigns no character
to it, and messages that contain it are refused."""
PADDING = NEW_DOCUMENT << KIND_BIT
"""Token that fills the rest of a sequence: id 0, with the kind ``NEW_DOCUMENT`` in its high bits. Each such token is a
document of its own."""
Messages = list[dict[str, str]]
Places = list[tuple[int, int]]
"""Beginning and end of each answer in a text, as offsets in characters."""


class GenerationBlock(Extension):
    """Extension of jinja2 for the block ``{% generation %}`` of transformers, in which a template writes the answer of
    the assistant. The rendered text has ``SIGN`` before and after the block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        """Parse one ``{% generation %}`` block. Return its nodes, with a node that writes ``SIGN`` before and after."""
        next(parser.stream)
        sign = Output([TemplateData(SIGN)])
        return [sign, *parser.parse_statements(("name:endgeneration",), drop_needle=True), sign]


def raise_exception(message: str) -> None:
    """Raise TemplateError. Templates call this function to refuse a conversation."""
    raise TemplateError(message)


class ChatTemplate:
    """Chat template of a tokenizer, which turns messages into text and tokens."""

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self._model, self._chat = tokenizer.model, tokenizer.chat
        special = [token.content for token in self._model.get_added_tokens_decoder().values() if token.special]
        self._turn_end = re.compile(rf"\s*({'|'.join(map(re.escape, special)) or '(?!)'})")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
        self._template = environment.from_string(self._chat["chat_template"])

    def render(self, messages: Messages) -> tuple[str, Places]:
        """Render messages by the template. Return the text without ``SIGN``, and the places of its marked parts. A part
        is marked if the template has written ``SIGN`` before and after it."""
        given = {**self._chat, "messages": messages, "tools": None, "add_generation_prompt": False}
        parts = self._template.render(given).split(SIGN)
        ends = [*accumulate(map(len, parts))]
        return "".join(parts), [*zip(ends[:-1:2], ends[1::2], strict=True)]

    def find_answers(self, messages: Messages) -> tuple[str, Places]:
        """Return the text of a conversation, and the places of its answers in the text.

        If the template has blocks ``{% generation %}``, these are the answers. Otherwise an answer is the content of an
        assistant's message, without leading whitespace, with the special token that ends the turn.

        Raises:
            ValueError: the template changes an answer, or writes no special token after it.
        """
        text, places = self.render(messages)
        if places:
            return text, places
        signed = [dict(each) for each in messages]
        for each in signed:
            if each["role"] == "assistant":
                inner = each["content"].strip()  # without the whitespace that many templates strip
                each["content"] = each["content"].replace(inner, f"{SIGN}{inner}{SIGN}", 1)
        found, places = self.render(signed)
        turns = [(begin, self._turn_end.match(text, end)) for begin, end in places]
        if found != text or not all(end for _, end in turns):
            raise ValueError("the chat template changes an answer, or writes no special token after it")
        return text, [(begin, end.end()) for begin, end in turns if end]

    def encode(self, where: str, messages: Messages) -> Ids:
        """Return the tokens of a conversation, (N,) uint32. The lowest ``KIND_BIT`` bits of a token are its id, and the
        higher bits are its kind.

        Raises:
            ConfigError: the messages are wrong, or the template refuses them. The error names ``where``, their place in
                the corpus.
        """
        try:
            for each in messages:
                if each["role"] not in ROLES or not isinstance(each["content"], str) or SIGN in each["content"]:
                    raise ValueError(f"the message {each}")
            text, answers = self.find_answers(messages)
            tokens = self._model.encode(text, add_special_tokens=False)
        except Exception as error:  # a template may fail in any way
            raise ConfigError(
                f"{where}: {error} ({type(error).__name__})",
                f"messages with role ({', '.join(ROLES)}) and content (text), as the chat template accepts them",
                "other messages, or a chat_template.jinja with {% generation %} around answers",
            ) from error
        kinds = [0 if any(a < end and b > begin for begin, end in answers) else CONTEXT for a, b in tokens.offsets]
        kinds[:1] = [NEW_DOCUMENT]
        return np.array(tokens.ids, np.uint32) | np.array(kinds, np.uint32) << np.uint32(KIND_BIT)


def encode_conversations(
    pieces: Iterable[Piece], tokenizer: Tokenizer | None, length: int
) -> Iterator[tuple[int, Ids, int, int]]:
    """Yield four values for each conversation: its split (TRAIN or VAL), its tokens with kinds (``KIND_BIT``), the size
    of its piece in bytes, and a code.

    The code is 1 for a whole conversation. It is 2 for a conversation that was cut at ``length`` tokens. It is 0 if the
    first ``length`` tokens have no answer: such a conversation is left out, and its array of tokens is empty.

    The tokens of a split are sequences of ``length`` tokens, filled with conversations. If a conversation does not fit
    into the rest of a sequence, padding fills this rest. The item of the conversation then begins with this padding.
    The last item of each split is only padding, with 0 bytes and code 0. It fills the last sequence and one more,
    because the target of a sequence's last token is in the next sequence.

    Args:
        pieces: the conversations, each as JSON (see ``Piece.data``).
        tokenizer: an ``HfTokenizer`` with a chat template.
        length: number of tokens of a sequence.

    Raises:
        ConfigError: messages are wrong, or the chat template refuses them.
    """
    assert isinstance(tokenizer, HfTokenizer), "DataConfig.validate asks for it"
    with readable("the chat template beside data.tokenizer_path"):
        template = ChatTemplate(tokenizer)
    filled = [0, 0]
    for piece in pieces:
        whole = template.encode(*json.loads(piece.data))
        ids, ends = whole[:length], 1 + (len(whole) > length)
        if (ids >> KIND_BIT).all():
            ids, ends = ids[:0], 0
        free = -filled[piece.split] % length
        ids = np.pad(ids, (free if free < len(ids) else 0, 0), constant_values=PADDING)
        filled[piece.split] += len(ids)
        yield piece.split, ids, len(piece.data), ends
    for split, tokens in enumerate(filled):
        if tokens:
            yield split, np.full(-tokens % length + length, PADDING), 0, 0
