"""The fixtures of the tests of CUDA graphs."""

from tests.support.graph_cases import net, recorder
from tests.support.training_graph_cases import tapes

__all__ = ["net", "recorder", "tapes"]
