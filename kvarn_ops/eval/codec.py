"""How text becomes tokens: a tokenizer beside the model, or bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError, reason

__all__ = ["ByteCodec", "Codec", "TokenizerCodec", "load_codec"]

_BYTE_VOCABULARY = range(256, 301)  # 256 bytes and a few special tokens
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Codec(Protocol):
    """How text becomes tokens."""

    unit: str

    def encode(self, text: bytes) -> Tensor:
        """Token ids `[n]` int64 of a text."""
        ...

    def prompt(self, text: str) -> Tensor:
        """Token ids `[n]` int64 of a user's message, in the model's chat template if it has one."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...

    def start(self, window: Tensor) -> Tensor:
        """Adapt a window `[n]` cut out of the middle of a text to what the model expects."""
        ...

    def end(self, prompt: Tensor, shortest: int) -> Tensor:
        """Cut a prompt `[n]` where a continuation reads well, to `shortest` tokens or more."""
        ...


class ByteCodec:
    """Token ids are bytes; larger ids mean nothing as text."""

    unit = "byte"

    def encode(self, text: bytes) -> Tensor:
        """Token ids `[n]` int64 of a text."""
        return torch.tensor(list(text), dtype=torch.int64)

    def prompt(self, text: str) -> Tensor:
        """The bytes of the text."""
        return self.encode(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def start(self, window: Tensor) -> Tensor:
        """The window itself: the model was trained on windows from anywhere in a file."""
        return window

    def end(self, prompt: Tensor, shortest: int) -> Tensor:
        """The prompt up to the end of its last line."""
        lines = (prompt == ord("\n")).nonzero()
        length = int(lines[-1]) + 1 if len(lines) else 0
        return prompt[:length] if length >= shortest else prompt


class TokenizerCodec:
    """The tokenizer that lies beside a model."""

    unit = "token"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        self._bos = bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None

    def encode(self, text: bytes) -> Tensor:
        """Token ids `[n]` int64 of a text."""
        readable = text.decode("utf-8", errors="replace")
        ids = self._tokenizer(readable, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64)

    def prompt(self, text: str) -> Tensor:
        """Token ids `[n]` int64 of a user's message, in the chat template if there is one."""
        if not getattr(self._tokenizer, "chat_template", None):
            return torch.tensor(self._tokenizer(text).input_ids, dtype=torch.int64)
        message = [{"role": "user", "content": text}]
        whole = self._tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False
        )
        ids = self._tokenizer(whole, add_special_tokens=False).input_ids
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def start(self, window: Tensor) -> Tensor:
        """Put the token in front that the tokenizer puts in front of every text."""
        if self._bos is None:
            return window
        return torch.cat([torch.tensor([self._bos]), window[:-1]])

    def end(self, prompt: Tensor, shortest: int) -> Tensor:
        """The prompt itself: tokens end where words do, more or less."""
        return prompt


def load_codec(directory: Path, vocab_size: int) -> Codec:
    """The tokenizer in a model's directory, or bytes for a vocabulary of bytes.

    Raises
    ------
    InputError
        If it cannot be loaded, or there is none.
    """
    if any((directory / name).is_file() for name in _TOKENIZER_FILES):
        from transformers import AutoTokenizer

        try:
            return TokenizerCodec(AutoTokenizer.from_pretrained(directory, local_files_only=True))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"the tokenizer in {str(directory)!r} cannot be loaded: {reason(error)}"
            ) from error
    if vocab_size in _BYTE_VOCABULARY:
        return ByteCodec()
    raise InputError(
        f"{str(directory)!r} has no tokenizer, and its vocabulary of {vocab_size} is not bytes "
        f"({_BYTE_VOCABULARY.start} to {_BYTE_VOCABULARY.stop - 1}): put the model's tokenizer "
        "files beside it."
    )
