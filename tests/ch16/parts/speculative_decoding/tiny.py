"""Tiny models of random weights, prompts for them, and one thread to compute them."""

import torch

VOCABULARY = 32


def one_thread_each():
    """For a fixture: tiny models are computed fastest by one thread; several wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(layers, seed):
    """A Llama of random weights, wide enough apart that no two tokens tie in FP32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt_of(seed, length=12):
    return torch.randint(VOCABULARY, (length,), generator=generator(seed)).tolist()
