"""transformers' own quantized caches, which commands and `benchmarks/` compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import QuantizedCache

from ..env import is_installed
from ..errors import InputError
from ..hf.stock import tensors_of

__all__ = ["PEERS", "Peer", "cache_bytes", "parse_peers"]


@dataclass(frozen=True)
class Peer:
    """A backend of transformers' `QuantizedCache` with its bits."""

    name: str
    backend: str
    bits: int
    package: str | None  # import name
    distribution: str = ""
    options: tuple[tuple[str, int], ...] = ()

    def new_cache(self, model_config: Any) -> QuantizedCache:
        """An empty cache."""
        return QuantizedCache(self.backend, model_config, **dict(self.options))

    @property
    def missing(self) -> str | None:
        """A sentence if its package is not installed, else None."""
        if self.package is None or is_installed(self.package):
            return None
        return (
            f"the cache {self.name} needs {self.distribution}, which is not installed: pip install "
            f"{self.distribution}, or leave it out."
        )


PEERS = {
    peer.name: peer
    for peer in (
        Peer("quanto4", "quanto", 4, "optimum.quanto", "optimum-quanto", (("nbits", 4),)),
        Peer("quanto2", "quanto", 2, "optimum.quanto", "optimum-quanto", (("nbits", 2),)),
        Peer(
            "hqq4", "hqq", 4, "hqq", "hqq", (("nbits", 4), ("axis_key", 1), ("axis_value", 1))
        ),  # its default axis, 0, is refused by some shapes
        Peer("fp8", "fp8", 8, None),
    )
}


def parse_peers(names: str) -> list[Peer]:
    """Peers by name, with commas; "" is none.

    Raises
    ------
    InputError
        If there is no such peer, or its package is not installed.
    """
    found = []
    for name in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        if name not in PEERS:
            raise InputError(
                f"--peers {name}: there is no such cache, choose of {', '.join(PEERS)}."
            )
        if sentence := PEERS[name].missing:
            raise InputError(sentence)
        found.append(PEERS[name])
    return found


def cache_bytes(cache: Any) -> int:
    """Bytes of the distinct storages that a cache's layers hold."""
    tensors = tensors_of([vars(layer) for layer in cache.layers])
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
