"""The fixtures of the tests of CUDA graphs."""

from graphcases import net, recorder

__all__ = ["net", "recorder"]
