"""The collector of reference cycles rests while imports that stay are made, and is as before afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from launch.process import lasting_imports


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("was_on", [True, False])
def test_what_was_imported_is_never_looked_at_again(was_on: bool) -> None:
    if not was_on:
        gc.disable()
    with lasting_imports():
        assert not gc.isenabled()
        stays: list[object] = []
        stays.append(stays)  # a cycle, as modules have with their functions
    assert gc.isenabled() is was_on
    assert all(tracked is not stays for tracked in gc.get_objects())


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError), lasting_imports():
        import gpt.there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
