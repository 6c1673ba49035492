"""Benchmarks of resnet_fast beside its peers; ``resnet-fast bench`` and pytest-benchmark run the same suites."""
