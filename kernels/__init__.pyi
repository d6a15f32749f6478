# Public names of kvarn_ops.kernels: none yet.
