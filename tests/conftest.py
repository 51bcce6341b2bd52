import os
import tempfile

# Two processes of one thread each are faster than one process of two threads: most tests are too small for a second thread.
# Set before torch is imported, which reads it once. Processes that a test starts inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is tuned on this machine must not decide what is tested. Processes that a test starts inherit it.
os.environ["CAVMAE_TUNED"] = os.path.join(tempfile.gettempdir(), "cavmae_fast-tests-find-nothing-here")

import torch

# Without a GPU the kernels run in Triton's interpreter, which must be asked for before the first kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
