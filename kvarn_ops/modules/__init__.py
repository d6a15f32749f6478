"""Models with KV-cache modules of their own: recognised by what they do, then packed in place."""
