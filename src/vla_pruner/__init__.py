"""vla-pruner: drop the visual tokens that a vision-language-action policy does not need."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_pruner import methods, models
    from vla_pruner.models.prune import prune
    from vla_pruner.surgery.session import Session

__version__ = "0.1.0"

__all__ = ["Session", "__version__", "methods", "models", "prune"]

_HOME = {"prune": "vla_pruner.models.prune", "Session": "vla_pruner.surgery.session"}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that the command line answers without torch."""
    if name in ("methods", "models"):
        return import_module(f"vla_pruner.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
