"""What models are asked: generated puzzles, and adapters for published benchmarks."""
