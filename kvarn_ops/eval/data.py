"""What is measured: a local model, and windows of text that it was not trained on."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvarn_ops

from ..errors import InputError, reason
from .codec import ByteCodec, Codec, load_codec

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
    codec = load_codec(directory, model.config.get_text_config(decoder=True).vocab_size)
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

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"--dtype {dtype}: give float32, bfloat16, float16 or auto.")
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
