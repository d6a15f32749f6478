"""`nn.Linear` that computes with rotated features, and keeps its own weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvarn_ops._compat import is_compiling, tensor_version
from kvarn_ops.errors import InputError

__all__ = ["FoldedLinear", "Folding", "fold_linear", "unfold_linear"]

FOLDABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Folding(NamedTuple):
    """Which features of a linear layer are rotated, in which frame."""

    features: Tensor  # [heads, head_dim] int64: rows of the weight, or columns if `is_input`
    scale: Tensor  # [heads, head_dim] float64, by which the weights of a feature are multiplied
    rotation: Tensor  # [head_dim, head_dim] float64
    is_input: bool  # the layer reads rotated features; else it writes them

    def of_weights(self, x: Tensor, dim: int) -> Tensor:
        """Weights with `features` in `dim` scaled and rotated, rounded once."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        scale, rotation = self.scale.to(x.device, wide), self.rotation.to(x.device, wide)
        return self._changed(x, dim, wide, lambda heads: heads * scale @ rotation)

    def of_activations(self, x: Tensor) -> Tensor:
        """What weights do, done to features `[..., n]`: rotate outputs, or rotate inputs back."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, rotation = self.scale.to(x.device, wide), self.rotation.to(x.device, wide)
        if self.is_input:
            return self._changed(x, -1, wide, lambda heads: heads @ rotation.mT * scale)
        return self._changed(x, -1, wide, lambda heads: heads * scale @ rotation)

    def _changed(
        self, x: Tensor, dim: int, wide: torch.dtype, change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        index = self.features.flatten().to(x.device)
        heads = x.index_select(dim, index).movedim(dim, -1).to(wide)
        changed = change(heads.unflatten(-1, self.features.shape)).to(x.dtype)
        return x.index_copy(dim, index, changed.flatten(-2).movedim(-1, dim))


class FoldedLinear(nn.Linear):
    """What `fold_linear` makes of an `nn.Linear`, in place.

    `weight` and `bias` stay what they were, for whoever reads or writes them: `state_dict`,
    `load_state_dict`, optimizers, `unfold_linear`. The rotated copies are buffers that are not
    saved, and are made anew when the weights were changed. Gradients go to `weight` and `bias`:
    where they are wanted, features are rotated instead of weights, which is slower.
    """

    kvarn_folding: Folding
    kvarn_weight: Tensor
    kvarn_bias: Tensor | None
    kvarn_source: tuple[Any, ...]  # the weights that were folded last, and their versions

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, one of them rotated."""
        folding = self.kvarn_folding
        if torch.is_grad_enabled() and self._wants_gradients():
            if folding.is_input:
                return F.linear(folding.of_activations(input), self.weight, self.bias)
            return folding.of_activations(F.linear(input, self.weight, self.bias))
        if not is_compiling():
            self.refresh()
        bias = self.bias if folding.is_input else self.kvarn_bias
        return F.linear(input, self.kvarn_weight, bias)

    def refresh(self) -> None:
        """Fold again if weights were replaced or changed in place since the last time."""
        source = _source(self.weight, self.bias)
        old = self.kvarn_source
        if source[0] is old[0] and source[1] is old[1] and source[2:] == old[2:]:
            return
        self.refold()

    @torch.no_grad()
    def refold(self) -> None:
        """Compute the rotated copies from the weights; they keep their addresses if they fit."""
        if type(self.weight) is not nn.Parameter or self.weight.dtype not in FOLDABLE_DTYPES:
            raise InputError(
                f"the weight of a linear layer with a folded rotation is now a "
                f"{type(self.weight).__name__} of {self.weight.dtype}: call "
                "kvarn_ops.unpatch(model) first, then quantize or convert, then patch again."
            )
        folding, bias = self.kvarn_folding, None
        weight = folding.of_weights(self.weight, 1 if folding.is_input else 0)
        if self.bias is not None and not folding.is_input:
            bias = folding.of_weights(self.bias, 0)
        for name, new in (("kvarn_weight", weight), ("kvarn_bias", bias)):
            old = self._buffers.get(name)
            if old is not None and new is not None and _alike(old, new):
                old.copy_(new)
            else:
                self.register_buffer(name, new, persistent=False)
        self.kvarn_source = _source(self.weight, self.bias)

    def train(self, mode: bool = True) -> FoldedLinear:
        """Also refresh: compiled code that runs after `model.eval()` sees trained weights."""
        super().train(mode)
        self.refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refold()

    def _wants_gradients(self) -> bool:
        bias = self.bias
        return self.weight.requires_grad or (bias is not None and bias.requires_grad)


@torch.no_grad()
def fold_linear(linear: nn.Linear, folding: Folding) -> None:
    """Turn a plain `nn.Linear` into a `FoldedLinear`: the same object, of another class."""
    linear.__class__ = FoldedLinear
    assert isinstance(linear, FoldedLinear)
    linear.kvarn_folding = folding
    linear.refold()


def unfold_linear(linear: FoldedLinear) -> None:
    """Undo `fold_linear`; the weights never changed."""
    for name in ("kvarn_folding", "kvarn_weight", "kvarn_bias", "kvarn_source"):
        delattr(linear, name)
    linear.__class__ = nn.Linear  # type: ignore[assignment]


def _source(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    return weight, bias, tensor_version(weight), 0 if bias is None else tensor_version(bias)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
