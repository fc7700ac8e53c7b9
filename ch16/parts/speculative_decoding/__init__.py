"""Parts of ../speculative_decoding.py: the loop, its drafts, the theory, the real engine."""
