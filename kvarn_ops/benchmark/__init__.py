"""`kvarn-ops bench`: decode attention on this machine, and the tools that `benchmarks/` uses.

Data flows `decode_step -> timing -> results -> plots`, put together in `run`.
"""
