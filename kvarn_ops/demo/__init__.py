"""`kvarn-ops demo`: a real model, decoded from a dense and from packed caches, side by side.

Data flows `data -> decode -> report`, put together in `run`. transformers and matplotlib are
optional packages of this project, so that only the command imports this package.
"""
