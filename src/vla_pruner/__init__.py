"""vla-pruner: drop the visual tokens that a vision-language-action policy does not need."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_pruner import methods, models
    from vla_pruner.core.session import Session, StepReport
    from vla_pruner.methods import list_methods
    from vla_pruner.models import list_models
    from vla_pruner.models.explain import explain
    from vla_pruner.models.prune import prune, remove

__version__ = "0.2.0"

__all__ = [
    "Session",
    "StepReport",
    "__version__",
    "explain",
    "list_methods",
    "list_models",
    "methods",
    "models",
    "prune",
    "remove",
]

_HOME = {
    "Session": "vla_pruner.core.session",
    "StepReport": "vla_pruner.core.session",
    "explain": "vla_pruner.models.explain",
    "list_methods": "vla_pruner.methods",
    "list_models": "vla_pruner.models",
    "prune": "vla_pruner.models.prune",
    "remove": "vla_pruner.models.prune",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that the command line answers without torch."""
    if name in ("methods", "models"):
        return import_module(f"vla_pruner.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
