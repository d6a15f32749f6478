"""The ops `torch.ops.kvarn.*`. Importing this package registers them."""

from . import append, attention, quantize  # noqa: F401  (registration)
