"""Tasks of lm-eval's harness (``eval.tasks``): whether it knows them, and the tasks with their documents.

Needs the extra ``eval``. Imports no torch, because the login node calls it before it submits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from launch.errors import ConfigError, closest

TEXTLESS = ("synthetic", "unknown", "char")
"""Kinds of tokenizers that cannot encode any text."""


def check_tasks(tasks: Sequence[str], tokenizer: str) -> None:
    """Raise ConfigError if lm-eval does not know one of ``tasks``, or the tokenizer of the corpus cannot encode them.

    Args:
        tasks: names of tasks, and YAML files.
        tokenizer: kind of the tokenizer, as in ``Corpus.tokenizer``.
    """
    if tasks and tokenizer in TEXTLESS:
        raise ConfigError(
            f"eval.tasks=[{','.join(tasks)}] with {tokenizer} tokens",
            "a corpus whose tokenizer encodes any text",
            "data=text data.path=FILE data.tokenizer=byte, or eval.tasks=[]",
        )
    for task in tasks:
        if not Path(task).is_file() and task not in (known := task_manager(tuple(tasks)).all_tasks):
            raise ConfigError(
                f"eval.tasks with {task}, which is no task of lm-eval, and no file",
                "names that `lm-eval ls tasks` prints, or YAML files (FOLDER/NAME.yaml)",
                f"eval.tasks=[{(closest(task, known) or ['hellaswag'])[0]}]",
            )


@cache
def task_manager(tasks: tuple[str, ...]) -> Any:
    """Return lm-eval's index of tasks. It is empty if all ``tasks`` are files, because reading it takes seconds."""
    from lm_eval.tasks import TaskManager  # slow to import

    return TaskManager(include_defaults=any(Path(task).suffix != ".yaml" for task in tasks))


def load_tasks(tasks: Sequence[str]) -> Any:
    """Return lm-eval's tasks with their documents, which it may download.

    Raises:
        ConfigError: a task cannot be loaded, or would run code that a model has written.
    """
    try:
        loaded = task_manager(tuple(tasks)).load(list(tasks))
        if any(
            getattr(task, kind, False) for task in loaded["tasks"].values() for kind in ("UNSAFE_CODE", "MULTIMODAL")
        ):
            raise ValueError("a task runs code that the model writes, or shows it pictures")
    except Exception as error:  # of lm-eval, of the library of data sets, or of the task's own code
        raise ConfigError(
            f"eval.tasks=[{','.join(tasks)}] cannot be loaded ({type(error).__name__}: {error})",
            "tasks of text without code, whose data sets are on this machine or can be downloaded",
            "HF_HOME=FOLDER of a machine that has downloaded them, or eval.tasks=[]",
        ) from error
    return loaded
