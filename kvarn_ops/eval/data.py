"""What is measured: a local model, and windows of text that it was not trained on."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import kvarn_ops

from ..errors import InputError, reason

__all__ = [
    "ByteCodec",
    "Codec",
    "Subject",
    "Window",
    "cut_windows",
    "find_model",
    "load_model",
    "load_subject",
    "read_documents",
]

_BYTE_VOCABULARY = range(256, 301)  # 256 bytes and a few special tokens
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Codec(Protocol):
    """How text becomes tokens."""

    unit: str

    def encode(self, text: bytes) -> Tensor:
        """Token ids `[n]` int64 of a text."""
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


@dataclass(frozen=True)
class Subject:
    """A model that is ready to run, and how it reads text."""

    name: str
    model: Any  # a transformers PreTrainedModel in eval mode
    codec: Codec
    device: torch.device


@dataclass(frozen=True)
class Window:
    """`ids` `[n]` int64, cut from `source` at token `start`."""

    source: str
    start: int
    ids: Tensor


def find_model(model: Path | None, shipped: str = "byte_model") -> Path:
    """Return the directory of the model: the given one, or a shipped model of a checkout.

    Raises
    ------
    InputError
        If there is no such directory, or none was given and the installation has no model.
    """
    if model is None:
        found = Path(kvarn_ops.__file__).resolve().parents[1] / "examples" / shipped
        if not (found / "config.json").is_file():
            raise InputError(
                f"this installation has no model (only a source checkout has examples/{shipped}): "
                "give a local Hugging Face causal language model with --model DIR and a text with "
                "--text FILE."
            )
        return found
    if not model.is_dir():
        raise InputError(
            f"the model directory {str(model)!r} does not exist: --model takes a local directory "
            "in Hugging Face format."
        )
    return model


def load_subject(directory: Path, device: str, dtype: str = "auto") -> Subject:
    """Load a model and what turns text into its tokens; arguments as in `load_model`.

    Raises
    ------
    InputError
        If the directory holds no causal language model, or no way to turn text into tokens.
    """
    model = load_model(directory, device, dtype)
    codec = _load_codec(directory, model.config.get_text_config(decoder=True).vocab_size)
    return Subject(directory.resolve().name, model, codec, model.device)


def load_model(directory: Path, device: str, dtype: str = "auto") -> Any:
    """Load a causal language model, in eval mode.

    Parameters
    ----------
    directory : Path
        In Hugging Face format.
    device, dtype : str
        Where and in which dtype; "auto" is the stored one, except fp16 on a CPU, where it is slow
        and becomes fp32.

    Raises
    ------
    InputError
        If the directory holds no causal language model, or the device cannot be used.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {reason(error)}") from None
    transformers_logging.disable_progress_bar()  # the commands have their own
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{str(directory)!r} cannot be loaded as a causal language model: {reason(error)}"
        ) from error
    if dtype == "auto" and model.dtype == torch.float16 and where.type == "cpu":
        model = model.float()
    return model.to(where).eval()


def _load_codec(directory: Path, vocab_size: int) -> Codec:
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


def read_documents(directory: Path, text: Path | None) -> tuple[dict[str, bytes], list[str]]:
    """Read the texts: the given file, or the modules that the model's `heldout.json` names.

    Returns
    -------
    documents, missing
        Text by name, and the held-out modules that this Python's standard library does not have.

    Raises
    ------
    InputError
        If there is no such file, or neither a file nor a list of held-out modules.
    """
    if text is not None:
        if not text.is_file():
            raise InputError(f"the text file {str(text)!r} does not exist.")
        return {text.name: text.read_bytes()}, []
    listing = directory / "heldout.json"
    if not listing.is_file():
        raise InputError(
            f"{str(directory)!r} does not say which texts its training left out (heldout.json): "
            "give a text with --text FILE."
        )
    names = sorted(json.loads(listing.read_text())["modules"])
    library = Path(sysconfig.get_path("stdlib"))
    found = {name: library / name for name in names if (library / name).is_file()}
    if not found:
        raise InputError(
            f"none of the held-out modules is in {str(library)!r} as source: give a text with "
            "--text FILE."
        )
    missing = [name for name in names if name not in found]
    return {name: path.read_bytes() for name, path in found.items()}, missing


def cut_windows(documents: dict[str, Tensor], length: int, count: int) -> list[Window]:
    """Cut windows of `length` tokens that do not overlap, taking documents in turn.

    Windows near the middle of a document come first: beginnings are licenses and imports.

    Parameters
    ----------
    documents : dict of str to Tensor
        Token ids `[n]` by name.
    length, count : int
        Tokens per window; at most this many windows.

    Raises
    ------
    InputError
        If not even one window fits.
    """
    slots = {}
    for name, ids in documents.items():
        fits = len(ids) // length
        slots[name] = sorted(range(fits), key=lambda slot: (abs(slot - fits // 2), slot))
    turns = max(map(len, slots.values()), default=0)
    if turns == 0:
        longest = max(map(len, documents.values()), default=0)
        raise InputError(
            f"the text is too short: {length} tokens are needed and it has {longest}. Give a "
            "longer one, or a smaller --context."
        )
    order = [(name, slots[name][turn]) for turn in range(turns) for name in slots
             if turn < len(slots[name])]  # fmt: skip
    return [
        Window(name, slot * length, documents[name][slot * length : (slot + 1) * length])
        for name, slot in order[:count]
    ]
