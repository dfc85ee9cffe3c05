"""Search of Python's tracebacks in a text, such as a log: the exceptions of the last failure, with their causes."""

from __future__ import annotations

import re
from typing import NamedTuple

HEADER = "Traceback (most recent call last)"
PREFIX = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
"""Pattern of the start of each line of a traceback that torch prints."""
MARGIN = re.compile(r"^ *[|+]-?\+? ?", re.MULTILINE)
"""Pattern of the characters that Python prints before each line of the traceback of an exception group."""
RAISED = re.compile(r"^[A-Za-z_][\w.<>]*(?:: ?.*)?$", re.MULTILINE)
"""Pattern of the line of a traceback that names the exception, whatever its class is called."""
JOINT = re.compile(
    r"(?:following exception|(?P<handled>another exception occurred)):\s*(?:Exception Group )?\Z|"
    r"(?P<member>^-+ \d+ -+\n)\Z|\bOriginal \Z|CheckpointException ranks.*\n\Z",
    re.MULTILINE,
)
"""Pattern of the text before a traceback, if the exception before it belongs to the same failure.

Torch embeds the traceback of a loader worker, or of a rank that could not save, in the message of another exception.
"""
LONGEST = 100_000
"""Number of characters at the end of a text in which tracebacks are looked for."""


class Raised(NamedTuple):
    """One exception of a failure."""

    line: str
    """Class and first line of the message."""
    text: str
    """Class and message, without line ends, 1,000 characters at most."""
    is_handled: bool
    """True if this exception was being handled when a later exception of the failure was raised.

    The later exception does not name this exception as its cause (``raise ... from``).
    """
    is_member: bool
    """True if the exception is a member of an ExceptionGroup."""
    stack: str
    """Frames of the traceback as text, without the line that names the exception."""


def exceptions_in(text: str) -> list[Raised]:
    """Return the exceptions of the failure whose traceback is last in ``text``; empty if there is no traceback.

    Causes come first. The last one is the exception with which the failure ended.
    """
    text = PREFIX.sub("", text[-LONGEST:])
    if "Exception Group " + HEADER in text:
        text = MARGIN.sub("", text)
    blocks, found, is_handled = text.split(HEADER), [], False
    while len(blocks) > 1:
        block = blocks.pop()
        joint = JOINT.search(blocks[-1])
        if line := RAISED.search(block):
            words = re.split(r"\n\n|\n--", block[line.start() :])[0].split()
            is_member = bool(joint and joint["member"])
            found.append(Raised(line[0], " ".join(words)[:1000], is_handled, is_member, block[: line.start()]))
        if not joint:
            break
        is_handled = is_handled or bool(joint["handled"])
    return [one for one in found[::-1] if one.is_member] + [one for one in found[::-1] if not one.is_member]


def failure_in(text: str) -> str:
    """Return the part of ``text`` with its last failure: the tracebacks of an exception and of all its causes."""
    number, blocks = len(exceptions_in(text)), text[-LONGEST:].split(HEADER)
    return HEADER.join(["", *blocks[-number:]]) if number else ""
