"""Offsets beyond 32 bits: tiles of a cache whose codes are larger than 4 GiB.

The memory is mapped, not used: of a cache for 67 million tokens only the last tiles are touched,
which a sliding window allows.
"""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from kernel_cases import CODES, SCALES
from kvarn_ops import KVarNConfig
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import TileCache, allocate

CONFIG = KVarNConfig.from_preset("k8v2_g128", num_sink_tokens=0)
HEADS, DIM = 2, 32
TILES = 2**32 // (HEADS * 128 * DIM) + 64
WINDOW = 200


def mapped(like: torch.Tensor, tiles: int) -> torch.Tensor:
    """Zeros with another number of tiles, backed by pages that do not exist until written."""
    shape = (*like.shape[:2], tiles, *like.shape[3:])
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, count * like.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps more than there is")
def test_last_tiles_of_a_huge_cache(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cuda":
        pytest.skip("test_gpu.py has the same with real memory")
    from triton.runtime.interpreter import GridExecutor

    # It would copy every argument onto itself, which touches all of it.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *args: None)
    small = allocate(CONFIG, 1, HEADS, DIM, 1024, torch.float32, "cpu")
    names = (*CODES, *SCALES)
    far = small._replace(
        **{name: mapped(getattr(small, name), TILES) for name in names},
        **{name: getattr(small, name).clone() for name in ("k_tail", "v_tail", "seq_lens")},
        **{name: getattr(small, name).clone() for name in ("k_equalizer", "v_equalizer")},
    )
    assert far.k_codes.numel() > 2**32
    first = TILES - 4
    far.seq_lens.fill_(first * 128)
    rotation = hadamard(DIM)
    generator = torch.Generator().manual_seed(0)

    def run(cache: TileCache) -> torch.Tensor:
        generator.manual_seed(0)
        k, v = torch.randn(2, 1, HEADS, 2 * 128 - 1, DIM, generator=generator)
        line = CONFIG.to_string()
        torch.ops.kvarn.append_(k, v, None, *cache, rotation, line, "triton")
        outs = []
        for _ in range(2):  # the first of them finishes a tile
            q = torch.randn(1, 4, 1, DIM, generator=generator)
            k, v = torch.randn(2, 1, HEADS, 1, DIM, generator=generator)
            outs.append(
                torch.ops.kvarn.step_(
                    q, k, v, None, *cache, rotation, None, 0.2, 0.0, True, line, "triton", WINDOW
                )
            )
        return torch.cat(outs)

    # Equalizers are made by tile 0 alone: the far rows get those of the near ones.
    near_out = run(small)
    far.k_equalizer.copy_(small.k_equalizer)
    far.v_equalizer.copy_(small.v_equalizer)
    torch.testing.assert_close(run(far), near_out, rtol=1e-3, atol=1e-4)
    for name in names:
        near = getattr(small, name)[:, :, :2]
        assert torch.equal(getattr(far, name)[:, :, first : first + 2], near), name
