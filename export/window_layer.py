"""Sliding-window layers that stay dense, in a form that programs can hold."""

from __future__ import annotations

from transformers.cache_utils import StaticLayer

__all__ = ["WindowLayer"]


class WindowLayer(StaticLayer):
    """Keys and values of all tokens of a layer whose window the attention mask cuts out.

    transformers' own layer keeps only the window, and counts tokens in Python, where a program
    would keep the count of the moment at which it was traced.
    """

    is_sliding = True  # for the masks of a model, which are made by kind of layer
