"""Model types of transformers that pass the comparison of docs/models.md.

Written by benchmarks/model_families.py; do not edit.
"""

TESTED_FAMILIES: tuple[str, ...] = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
)
