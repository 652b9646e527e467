"""Kernels for a CPU, compiled by Numba at their first use: the selective scan and what surrounds it in a mixer.

`scan` and `mixer` are called with tensors; `machine` says whether kernels run here, keeps them and launches them in
torch's threads. The `_kernels`, with `vectors`, `vector_math` and `work_space`, are the compiled code.
"""
