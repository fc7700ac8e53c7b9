"""Parts of continuous_batching.py: admission, batch sizes, prompts that disturb running streams, the picture."""
