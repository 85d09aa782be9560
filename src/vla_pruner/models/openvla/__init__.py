"""OpenVLA and OpenVLA-OFT: readable ports that load the published checkpoints by name."""

from .adapter import adapter
from .checkpoint import CheckpointError, from_pretrained, save_pretrained
from .config import OpenVLAConfig, OpenVLAOFTConfig, TowerConfig
from .modeling import OpenVLA
from .oft import OpenVLAOFT
from .processing import Inputs

__all__ = [
    "CheckpointError",
    "Inputs",
    "OpenVLA",
    "OpenVLAConfig",
    "OpenVLAOFT",
    "OpenVLAOFTConfig",
    "TowerConfig",
    "adapter",
    "from_pretrained",
    "save_pretrained",
]
