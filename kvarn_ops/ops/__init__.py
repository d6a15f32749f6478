"""The ops `torch.ops.kvarn.*`. Importing this package registers them."""

from . import append, append_at, attention, dequantize, quantize  # noqa: F401  (registration)
