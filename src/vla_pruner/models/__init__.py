"""Model families (`vp.list_models()`), and the adapters for models that no family knows."""

from vla_pruner._callable import listing_package
from vla_pruner.models.base import Adapter, Family, Layout, find_adapter, list_models, models
from vla_pruner.models.decoder import Decoder
from vla_pruner.models.given.folder import CheckpointError
from vla_pruner.models.hf_vlm import ImageTokenVLM
from vla_pruner.models.loading import load
from vla_pruner.models.port import NonFiniteActionError, Policy

__all__ = [
    "Adapter",
    "CheckpointError",
    "Decoder",
    "Family",
    "ImageTokenVLM",
    "Layout",
    "NonFiniteActionError",
    "Policy",
    "find_adapter",
    "list_models",
    "load",
    "models",
]

listing_package(__name__)
