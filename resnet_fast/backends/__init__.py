"""Implementations of the ops. Each backend is a folder; ``dispatch/catalog.py`` lists them."""
