"""The version, in one place: packaging reads it as text, ``resnet_fast.__version__`` re-exports it."""

__version__ = "0.1.0"
