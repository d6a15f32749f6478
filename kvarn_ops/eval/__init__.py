"""`kvarn-ops eval`: what a quantized cache does to a local causal language model, in decode mode.

Data flows `data, tasks -> cache -> protocols -> store -> report, plots`, put together in `run`.
Every method runs through one cache class (`cache`), whose tile schedule is the product's; `plus`
also runs through the product's own packed cache. transformers, safetensors and matplotlib are
optional packages of this project, so that only commands import this package.
"""
