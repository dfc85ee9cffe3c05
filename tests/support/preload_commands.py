"""Imports of our commands, in the server process that ``forking`` forks them from: once, and never collected.

All modules of gpt and launch but those that need what not every run has (deepspeed), and what those import only when
they need it.
"""

import pkgutil
from contextlib import suppress
from importlib import import_module

import gpt
import launch
from gpt.config.compose import compose_train
from launch.process import lasting_imports

with lasting_imports():
    import tests.support.preload  # noqa: F401
    from tests.support import learning
    from tests.support.composing import config_from

    for package in (gpt, launch):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None):
            if "deepspeed" not in module.name and not module.name.endswith("__main__"):
                with suppress(ImportError):  # an extra that is not installed
                    import_module(module.name)
    for name in (
        "hydra._internal.core_plugins.basic_sweeper",
        "hydra_plugins.launch_plugin.launcher",
        "submitit.core._submit",
        "submitit.local._local",
        "torch.distributed.pipelining",
        "torch.nn.attention.flex_attention",
    ):
        import_module(name)
    for chosen in ([], ["parallel=ddp"], ["parallel=fsdp"]):  # what most ranks are made of, but for values
        compose_train(chosen)
    for strategy in ("ddp", "fsdp", "zero1", "tp", "fsdp_tp", "pp", "cp", "ep", "zero2", "zero3"):  # ranks of tests
        config_from([*learning.TINY, f"parallel={strategy}", "optim.max_micro_batch=4"])
