"""Write the tables in docs/tables, which tests compare with. Each program is a module here, run from a checkout.

python -m resnet_fast.benchmarks.tables.static_budgets                          machine code of the Triton kernels
python -m resnet_fast.benchmarks.tables.training_budgets                        the same of the training kernels
TRITON_INTERPRET=1 python -m resnet_fast.benchmarks.tables.traffic              bytes that inference moves
TRITON_INTERPRET=1 python -m resnet_fast.benchmarks.tables.training_traffic     bytes that a training step moves
python -m resnet_fast.benchmarks.tables.cuda_budgets                            the CUDA kernels, with predictions
python -m resnet_fast.benchmarks.tables.compiled_traffic                        the same bytes as compiled
python -m resnet_fast.benchmarks.tables.compiled_training_traffic               likewise, of a training step
python -m resnet_fast.benchmarks.tables.ptx_mutants                             compiled kernels with one change
python -m resnet_fast.benchmarks.tables.ptx_sweep                               every shipped config, as compiled
python -m resnet_fast.benchmarks.tables.host_instructions                       instructions of a step on the host
"""

from .. import checkout

checkout.require("the programs that write docs/tables")
FOLDER = checkout.ROOT / "docs" / "tables"
