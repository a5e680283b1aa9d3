"""The pruning engine. Admission, datasets, discovery, families, headers, linears and registry import neither torch nor
numpy."""

import os

# Threads that wait for one another sleep: torch's would spin, which on a machine that has anything else to do takes the
# processor from the very thread that is waited for (a forward took 2.5 times as long). Heeded where torch is not loaded yet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# MKL gives back its packed copies of matrices after a product; kept, they are 47 MB beside a model of 270 MB.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
# numpy is called for single rows, for which threads of its own are no help.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
