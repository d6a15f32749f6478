"""The demo's table with transformers' QuantizedCache in it: quality, bytes and speed of the peers.

    python benchmarks/demo_peers.py --out benchmarks/results

Runs `kvarn-ops demo` on the shipped byte model with every peer whose package is installed, and
copies its table to `demo_peers_cpu.csv`. Further options go to the command.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvarn_ops.eval.peers import PEERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder")
    args, others = parser.parse_known_args()
    present = []
    for name, peer in PEERS.items():
        if peer.missing:
            print(peer.missing)
        else:
            present.append(name)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kvarn_ops", "demo", "--out", folder, *others]
        subprocess.run([*command, "--peers", ",".join(present)], check=True)
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "table.csv", args.out / "demo_peers_cpu.csv")


if __name__ == "__main__":
    main()
