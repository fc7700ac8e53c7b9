"""Parts of speculative_decoding.py: drafts, the lab of the loop, vLLM, theory, tables, claims, the picture."""
