"""Equalizers in a layer's life: crops that open the first tile again."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from kvarn_ops import KVarNConfig
from kvarn_ops.hf.layer import KVarNLayer


def test_a_first_tile_that_is_opened_again_gets_an_equalizer_of_its_own() -> None:
    """Two legal crops lead back before the first tile; other tokens follow."""
    config = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=8, tail_tokens=32)
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 104, 32)
    k[..., :64, 3] *= 12

    def layer() -> KVarNLayer:
        return KVarNLayer(256, config, "aten", {})

    def append(target: KVarNLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        target.armed = True
        target.update(keys, values)
        assert target.tiles is not None
        torch.ops.kvarn.append_(
            keys, values, None, *target.tiles, target.rotation, target.config_line, "aten"
        )
        target.cumulative_length.add_(keys.shape[2])

    cropped, fresh = layer(), layer()
    append(cropped, k[:, :, :72], v[:, :, :72])
    assert cropped.tiles.k_equalizer.any()
    cropped.crop(-32)
    cropped.crop(-30)
    for target in (cropped, fresh):
        if target is fresh:
            append(target, k[:, :, :10], v[:, :, :10])
        append(target, -k[:, :, 10:].flip(2), v[:, :, 10:].flip(2))
    for name in ("k_equalizer", "k_codes", "v_codes"):
        assert torch.equal(getattr(cropped.tiles, name), getattr(fresh.tiles, name)), name
