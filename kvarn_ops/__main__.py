"""``python -m kvarn_ops``: the same as the command ``kvarn-ops``."""

from __future__ import annotations

from kvarn_ops.cli import main

if __name__ == "__main__":
    main()
