"""Hugging Face transformers: the cache, the attention functions, and how a model is patched.

Data flows `adapter -> attention -> cache -> ops`; nothing here is imported by the core at module
level, since transformers is optional.
"""
