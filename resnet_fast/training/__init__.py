"""Training with the fused kernels, as a program on top of the package: nothing below imports it.

``recipe`` says what to compute, ``data``, ``augment`` and ``loader`` bring the images, ``optim`` and ``step`` do one
optimizer step, ``diagnosis`` says where a loss stopped being a number, ``loop`` runs the steps, ``checkpoint``,
``runlog`` and ``curves`` keep what happened, ``distributed`` spreads it over processes, ``experiments`` repeats the
paper's own comparisons.
"""
