import os

# Two processes of one thread each are faster than one process of two threads: most tests are too small for a second thread.
# Set before torch is imported, which reads it once. Processes that a test starts inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU the kernels run in Triton's interpreter, which must be asked for before the first kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
