"""Layers for Hugging Face's ``kernels`` library, and the command that builds a package of them.

    python -m resnet_fast.hub.build OUT       writes OUT/build/torch-cuda and OUT/build/torch-cpu

``kernels`` loads such a package from a folder or from the hub, under a name of its own, beside other versions of it. So
the modules of this package import each other by relative names, and define their ops under the name that they were
loaded by (:mod:`resnet_fast.ops.op`). What is built are these files as they are.
"""
