"""resnet_fast: fused conv-BN-ReLU-add kernels behind drop-in ResNets."""

from ._version import __version__

__all__ = ["__version__"]
