"""Make `vp.methods()` and `vp.models()` work although both are packages."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _ListingPackage(ModuleType):
    """A package that, when called, calls the function that has the package's own name."""

    def __call__(self) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]]()


def listing_package(name: str) -> None:
    """Let calling the package `name` list what it registers; a package in every other way."""
    sys.modules[name].__class__ = _ListingPackage
