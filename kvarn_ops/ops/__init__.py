"""The ops `torch.ops.kvarn.*`. Importing this package registers them."""

from . import append, append_at, attention, dequantize, quantize, read_only  # noqa: F401  (registration)
