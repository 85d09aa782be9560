"""pi0 and pi0.5: a readable port that loads the published checkpoints by name."""

from .adapter import Pi0Adapter, adapter
from .checkpoint import from_pretrained, save_pretrained
from .config import Pi0Config, StackConfig, VisionConfig
from .feature_cache import feature_cache
from .modeling import Pi0
from .prefix_reuse import PrefixGate, prefix_reuse
from .processing import Inputs

__all__ = [
    "Inputs",
    "Pi0",
    "Pi0Adapter",
    "Pi0Config",
    "PrefixGate",
    "StackConfig",
    "VisionConfig",
    "adapter",
    "feature_cache",
    "from_pretrained",
    "prefix_reuse",
    "save_pretrained",
]
