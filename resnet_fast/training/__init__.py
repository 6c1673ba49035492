"""Training with the fused kernels: a program on top of the package, which nothing else in it imports.

``recipe`` says what to compute, ``datasets``, ``augment`` and ``loader`` provide the images, ``optim`` and ``step`` do
one optimizer step, ``diagnosis`` finds where a loss stopped being a number. ``setup`` builds a run and ``loop`` runs
its steps. ``checkpoints``, ``runlog`` and ``curves`` keep what happened, ``distributed`` spreads a run over processes,
``restored`` and ``evaluate`` load and measure what it left, ``experiments`` repeats the paper's own comparisons.
"""
