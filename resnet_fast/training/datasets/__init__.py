"""Readers of the data sets in :data:`resnet_fast.training.data_sources.DATASETS`, one module per source.

``samples`` holds what a reader returns and what a run trains on. ``loading`` turns one into the other. ``arrays`` reads
the file formats of published sets.
"""
