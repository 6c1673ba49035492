"""Compare resnet_fast with its peers; ``resnet-fast bench`` and pytest-benchmark run the same suites."""
