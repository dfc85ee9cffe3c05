"""Imports of our commands and of the ranks of a test, in the server process that both are forked from: once.

All modules of gpt and launch but those that need deepspeed, which not every run has; what these modules import only
when they need it; and what ranks of tests import. A rank that lives for half a second would spend a good part of it on
pytest alone.
"""

import pkgutil
from contextlib import suppress
from importlib import import_module

import gpt
import launch
from gpt.config import compose_train
from gpt.workload import PRELOAD
from launch.runs.process import lasting_imports

with lasting_imports():
    import filelock  # noqa: F401
    import pytest  # noqa: F401
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.pipelining
    import torch.distributed.tensor
    import torch.profiler
    import torch.utils.serialization  # noqa: F401

    for name in (*PRELOAD, "tests.support.learning", "tests.support.checkpoints", "tests.support.small_models"):
        import_module(name)

    from tests.support import learning
    from tests.support.composing import config_from

    for package in (gpt, launch):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None):
            if "deepspeed" not in module.name and not module.name.endswith("__main__"):
                with suppress(ImportError):  # an extra that is not installed
                    import_module(module.name)
    for name in (
        "hydra._internal.core_plugins.basic_sweeper",
        "hydra_plugins.launch_plugin",
        "submitit.core._submit",
        "submitit.local._local",
        "torch.nn.attention.flex_attention",
    ):
        import_module(name)
    for chosen in ([], ["parallel=ddp"], ["parallel=fsdp"]):  # what most ranks are made of, but for values
        compose_train(chosen)
    for strategy in ("ddp", "fsdp", "zero1", "tp", "fsdp_tp", "pp", "cp", "ep", "zero2", "zero3"):  # ranks of tests
        config_from([*learning.TINY, f"parallel={strategy}", "optim.max_micro_batch=4"])
