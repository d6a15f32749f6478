"""The specification of the method in eager PyTorch, in the order of the paper.

Kernels and compiled formulas are tested against this package; it is tested against float64 models
and published vectors. Nothing here is tuned for speed.
"""
