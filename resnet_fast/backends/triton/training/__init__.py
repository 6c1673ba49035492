"""Training kernels: BatchNorm and ReLU in the convolutions' prologues, statistics in their epilogues, and the same in
reverse.

    vectors.py      the per-channel vectors, and the two ways to apply them: exact and packed
    conv_fwd.py     raw output and its statistics            conv_dgrad.py   gradient of the raw input, and its sums
    conv_wgrad.py   gradient of the weight, split over K     pack.py         weights as the kernels read them
    batch_norm.py   statistics -> vectors, sums -> gradient coefficients
    block_end.py    BatchNorm + add + ReLU at a block's end  pool.py         BatchNorm + ReLU + max-pool of the stem
    passes.py       what kernels without products share
    convolution.py  one convolution in its three directions, on our kernels or on cuDNN's
    chain.py        the order of launches, forward and backward
"""
