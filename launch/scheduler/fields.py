"""The one parser of what ``scontrol show ... --oneliner`` prints: ``Key=value`` pairs, whose values may hold blanks."""

from __future__ import annotations

import re

KEY = r"[A-Z][\w:/]*="
"""Such as ``JobState=``, ``AllocNode:Sid=`` and ``CPUs/Task=``."""
FIELD = re.compile(rf"(?:^|(?<=\s))({KEY})(.*?)(?=\s+{KEY}|\s*$)")
JOB_NAME = re.compile(r"(?<=\s)JobName=(.*?)(?=\s+UserId=)")


def parse_fields(line: str) -> dict[str, str]:
    """Read the fields of one line.

    A value (OS, Reason, Command) ends where the next key begins. What users choose may look like a key itself: the name
    of a job, which comes early, is taken out first, and of fields that come twice the first holds, since comments and
    paths come last.
    """
    name = JOB_NAME.search(line)
    if name is not None:
        line = line[: name.start()] + line[name.end() :].lstrip()
    fields = {"JobName": name.group(1)} if name is not None else {}
    for key, value in FIELD.findall(line):
        fields.setdefault(key.removesuffix("="), value)
    return fields
