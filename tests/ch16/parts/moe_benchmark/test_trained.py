"""Routers of a checkpoint: a tiny one with random weights, which is all that is needed to read them."""

import pytest
import torch
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from ch16.parts.moe_benchmark import trained
from ch16.parts.moe_benchmark.tables import balance_rows
from ch16.parts.moe_benchmark.trained import trained_routing
from common.cli import CannotRun

TINY = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TINY, num_hidden_layers=3, num_local_experts=6)).eval()


def test_choices_are_the_models_own():
    """Against the router's logits as its module gives them."""
    network, seen = mixtral(), []
    for layer in network.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0] @ module.weight.t()))
    ids = torch.randint(0, 64, (2, 10))
    layers = trained_routing(network, ids, top_k=2)
    assert len(layers) == 3 and len(seen) == 2 * 3  # window by window
    for i, routing in enumerate(layers):
        logits = torch.cat([seen[i], seen[i + 3]])
        assert routing.experts.shape == (20, 2)
        expected = logits.reshape(20, 6).topk(2).indices
        assert torch.equal(routing.experts, expected)
    rows = balance_rows(layers, 6)
    assert [row["layer"] for row in rows] == [0, 1, 2] and all(row["max_mean"] >= 1 for row in rows)


def test_a_dense_model_has_no_routers():
    dense = LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=1)).eval()
    with pytest.raises(CannotRun, match="router"):
        trained_routing(dense, torch.zeros(1, 4, dtype=torch.int64), 2)


def test_a_router_that_chooses_by_more_than_its_logits_is_refused():
    """Ernie adds a bias to each expert's probability before it chooses; without values it changes nothing."""
    sizes = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0}
    torch.manual_seed(0)
    network = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**TINY, **sizes, num_hidden_layers=2)).eval()
    ids, chosen = torch.randint(0, 64, (1, 10)), []
    network.model.layers[0].mlp.gate.register_forward_hook(lambda *of: chosen.append(of[2][2].sort().values))
    assert torch.equal(trained_routing(network, ids, 2)[0].experts.sort().values, chosen[0])
    bias = network.model.layers[0].mlp.gate.moe_statics.e_score_correction_bias
    bias.data[..., 3] = 10.0  # all choose expert 3, whatever the logits say
    with pytest.raises(CannotRun, match=r"choose by a bias for each expert \(model\.layers\.0\..*not by their logits"):
        trained_routing(network, ids, 2)
    bias.data.zero_()
    network.config.n_group = 2
    with pytest.raises(CannotRun, match="groups of experts"):
        trained_routing(network, ids, 2)


def test_a_short_text(monkeypatch):
    tokenizer = lambda text, **_: {"input_ids": torch.zeros(1, len(text), dtype=torch.int64)}  # noqa: E731
    monkeypatch.setattr(trained, "load_model", lambda *_: (mixtral(), tokenizer))
    machine = trained.Machine("cpu", "a CPU", 1, 1, 2, None, True, False)
    assert trained.read_with(None, "x" * 64, 60, 2, machine)[0].experts.shape == (60, 2)
    with pytest.raises(CannotRun, match="the text has 50 tokens; 60 are needed"):
        trained.read_with(None, "x" * 50, 60, 2, machine)
