"""Hugging Face transformers: the cache, the attention functions, and how a model is patched.

    inspection, attention_source       what can be packed in a model, and why not
    adapter, generation                what `patch` hooks and overrides, and puts back
    attention                          the attention and mask functions of a patched model
    cache, layer, crop, growth         `KVarNCache` and its packed layers
    fork, stock, cache_file            copies that share tiles, layers of transformers, saved caches
    model_dir, footprint, capacity*    `kvarn-ops inspect`

Data flows `adapter -> attention -> cache -> ops`; nothing here is imported by the core at module
level, since transformers is optional.
"""
