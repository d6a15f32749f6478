"""A piece: the unit of work of an evaluation, and the unit that a resumed run does not repeat."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvarn_ops

from ..config import KVarNConfig
from ..hf.cache import KVarNCache
from .baselines import SCALE_BITS
from .cache import MethodCache
from .methods import Method
from .peers import Peer
from .protocols import Tick

__all__ = ["Case", "Piece", "Tick", "generator_for"]

_PEER_GROUP = 64  # of transformers' QuantizedCache


@dataclass(frozen=True)
class Case:
    """A method under one preset, and whether it runs in the product's packed cache."""

    method: Method
    preset: str  # "-" where bits do not matter
    config: KVarNConfig
    packed: bool = False
    peer: Peer | None = None  # a cache of transformers instead

    @staticmethod
    def of_peer(peer: Peer, config: KVarNConfig) -> Case:
        """One of transformers' quantized caches; bits with 16-bit scales and zero points."""
        overhead = 0 if peer.backend == "fp8" else 2 * SCALE_BITS / _PEER_GROUP

        def unused(tile: Tensor, first: Tensor, config: KVarNConfig) -> Tensor:
            raise AssertionError("transformers quantizes this cache")

        method = Method(peer.name, unused, unused, lambda c, d: peer.bits + overhead)
        return Case(method, "-", config, peer=peer)

    @property
    def key(self) -> str:
        """Part of a file name."""
        name = self.method.name.replace("/", "-")
        name = name if self.preset == "-" else f"{name}_{self.preset}"
        if self.peer is not None:
            return f"{name}_QuantizedCache"
        return f"{name}_packed" if self.packed else name

    @property
    def cache_name(self) -> str:
        """The column `cache`."""
        if self.peer is not None:
            return "QuantizedCache"
        return "packed" if self.packed else "simulated"

    def run(
        self,
        model: Any,
        slots: int,
        body: Callable[[Any], Any],
        starts: list[int] | None = None,
    ) -> Any:
        """Call `body` with an empty cache that holds `slots` tokens per row."""
        if self.peer is not None:
            return body(self.peer.new_cache(model.config))
        if not self.packed:
            return body(MethodCache(model.config, self.method, self.config, starts))
        config = self.method.product_config(self.config)
        with kvarn_ops.patched(model, config):
            return body(KVarNCache(model.config, slots, config, device=model.device))


@dataclass(frozen=True)
class Piece:
    """Work that gives named tensors."""

    key: str  # names the file
    label: str  # of the progress bar
    forwards: int  # calls of the model, for the progress bar
    run: Callable[[Tick], dict[str, Tensor]]


def generator_for(seed: int, *parts: str) -> torch.Generator:
    """A generator that depends on the seed and on what it is for, not on what ran before."""
    return torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32("/".join(parts).encode()))
