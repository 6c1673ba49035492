"""The commands for a GPU: ``python3 -m resnet_fast.benchmarks.gpu.check``, ``.tune`` and ``.bench``.

    supervisor (session.py)          one per command: budget, order, results on disk; runs no kernel itself
        │  name of a case ▲ row
        ▼                 │
    workers (worker.py)             run the cases; one that crashes or hangs costs its case and is replaced

They run from a bare checkout, by the machine's own Python: what they import is the standard library, torch, triton,
torchvision, numpy, pytest and this repository. ``--device cpu`` runs the same code in Triton's interpreter.
"""
