# Public names of kvarn_ops.export: none yet.
