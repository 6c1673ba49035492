"""The fixtures of the tests of CUDA graphs."""

from tests.support.graph_cases import net, recorder

__all__ = ["net", "recorder"]
