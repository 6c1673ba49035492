"""Training kernels: BatchNorm and ReLU in the prologues of convolutions, statistics in their epilogues, and gradients.

vectors.py      the per-channel vectors, and the two ways to apply them: exact and packed
conv_fwd.py     raw output and its statistics            conv_dgrad.py   gradient of the raw input, and its sums
conv_wgrad.py   gradient of the weight, split over K     wgrad_tiles.py  the loads of its operands
pack.py         weights as the kernels read them
batch_norm.py   statistics -> vectors                    norm_gradient.py   sums -> gradient coefficients
arrival.py      who is last in a launch, and who waits   cudnn_passes.py    BatchNorm around a convolution on cuDNN
block_end.py    BatchNorm + add + ReLU at a block's end  pool.py         BatchNorm + ReLU + max-pool of the stem
passes.py       shared by the kernels without products   hand_over.py    the proof of arrival.py on a GPU
convolution.py  one convolution in its three directions, on our kernels or on cuDNN's
chain.py        the order of launches, forward and backward

Without batch statistics norms are folded into the weights, and the forward kernels are those of inference:

frozen_chain.py the order of launches                    step.py         which of the two chains runs a call
fold.py         folded weights, for both directions      fold_gradient.py   the splits of wgrads -> all gradients
pool_winner.py  max-pool of the stem that keeps winners  folded_problem.py  a launch on random tensors, for proofs
"""
