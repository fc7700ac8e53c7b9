"""The chapter's block and the script around it; with Transformer Engine in parts/fp8_quant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch16 import fp8_quant
from ch16.fp8_quant import FP8TransformerBlock, FP8TransformerModel, recipes
from ch16.parts.fp8_quant.blocks import measure_stack
from ch16.parts.fp8_quant.precision import Precision, load_quantized
from ch16.parts.fp8_quant.sizes import Fp8Sizes
from common.cli import CannotRun
from common.gpu import Machine

CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False)
BF16, RECIPES = Precision("BF16"), recipes(None)
SMALL = Fp8Sizes(64, 4, 2, 2, prefill=32, sequence=16, gemm_tokens=(), decode=(), context=0)


def block(precision, heads=4, kv_heads=2, seed=0):
    torch.manual_seed(seed)
    return FP8TransformerBlock(64, heads, kv_heads, precision=precision, device="cpu")


def fp8_twin(plain, precision, **options):
    small = block(precision, **options)
    load_quantized(small, plain, precision)
    return small


# ---- the block ----


def test_the_chapters_call():
    """Two arguments; without a recipe, delayed scaling by its name in whatever library there is."""
    small = FP8TransformerBlock(64, 4)
    assert small.precision.name == "delayed" and small.num_kv_heads == 4
    x = torch.randn(2, 5, 64, device=next(small.parameters()).device).bfloat16()
    y = small(x)
    assert y.shape == x.shape and bool(y.isfinite().all()) and not torch.allclose(y, x)


def test_attention_is_the_textbooks():
    """Grouped queries, causal softmax(q k / sqrt(D)) v, residuals and MLP, written out token by token."""
    b, x = block(BF16), torch.randn(2, 5, 64).bfloat16()
    q, k, v = b.qkv_proj(x).unflatten(-1, (8, 16)).split([4, 2, 2], dim=2)  # [B, S, heads, D]
    mixed = torch.zeros(2, 5, 4, 16)
    for t in range(5):
        for head in range(4):
            keys, values = k[:, : t + 1, head // 2].float(), v[:, : t + 1, head // 2].float()
            weights = torch.softmax((q[:, t, head, None].float() * keys).sum(-1) / 4, dim=-1)
            mixed[:, t, head] = (weights[..., None] * values).sum(1)
    y = x + b.out_proj(mixed.bfloat16().flatten(2))
    assert torch.allclose(b(x).float(), (y + b.mlp(y)).float(), atol=0.05)


@pytest.mark.parametrize("recipe", ["current", "block", "row", "weights"])
@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**31))
def test_fp8_agrees_with_bf16(recipe, batch, tokens, seed):
    """Six products, each at most two half steps of E4M3 (2 x 6.25%) off and in the mean far less."""
    plain = block(BF16)
    small = fp8_twin(plain, RECIPES[recipe])
    x = torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    difference = (small(x) - plain(x)).float().norm() / plain(x).float().norm()
    assert 0 < difference < 0.125


@pytest.mark.parametrize(
    "precision", [BF16, RECIPES["row"], RECIPES["block"], RECIPES["delayed"]], ids=lambda p: p.name
)
@settings(max_examples=20)
@given(st.integers(2, 40), st.data())
def test_a_later_token_never_changes_an_earlier_output(precision, tokens, data):
    small = fp8_twin(block(BF16), precision)
    at = data.draw(st.integers(1, tokens - 1))
    x = torch.randn(1, tokens, 64).bfloat16()
    changed = torch.cat([x[:, :at], torch.randn(1, tokens - at, 64).bfloat16() * 50], dim=1)
    assert torch.allclose(small(x)[:, :at], small(changed)[:, :at], atol=1e-6)


@pytest.mark.parametrize("precision", [BF16, RECIPES["row"]], ids=lambda p: p.name)
@pytest.mark.parametrize("prompt", [1, 5, 16])
def test_decode_with_a_cache_equals_prefill(precision, prompt):
    model = FP8TransformerModel(SMALL, BF16, "cpu")
    if precision is not BF16:
        small = FP8TransformerModel(SMALL, precision, "cpu")
        load_quantized(small, model, precision)
        model = small
    x = torch.randn(2, 20, 64).bfloat16()
    caches = [torch.zeros(2, 2, 2, 20, 16, dtype=torch.bfloat16) for _ in range(2)]
    steps = [model(x[:, :prompt], caches)]
    steps += [model(x[:, t : t + 1], caches, position=t) for t in range(prompt, 20)]
    assert torch.allclose(torch.cat(steps, 1).float(), model(x).float(), atol=0.1, rtol=0.05)


def test_a_second_prompt_into_a_cache_is_refused():
    with pytest.raises(ValueError, match="position 0"):
        block(BF16)(torch.randn(1, 2, 64).bfloat16(), torch.zeros(2, 1, 2, 8, 16).bfloat16(), position=3)


# ---- measurements on a CPU ----


@pytest.mark.parametrize("recipe", RECIPES)
def test_stack_memory_on_a_cpu(recipe):
    memory, speed = measure_stack(lambda p: FP8TransformerModel(SMALL, p, "cpu"), RECIPES[recipe], CPU, SMALL, 0)
    assert speed == [] and 0.4 < memory["weight_ratio"] <= 0.56
    assert memory["bf16_mb"] == pytest.approx(SMALL.bf16_weight_bytes / 1e6, rel=0.05)


def test_a_stack_that_disagrees_is_an_error():
    def build(precision):
        model = FP8TransformerModel(SMALL, precision, "cpu")
        if precision != BF16:
            model.register_forward_hook(lambda module, inputs, output: output * 1.5)
        return model

    with pytest.raises(CannotRun, match="differ by 5"):
        measure_stack(build, RECIPES["row"], CPU, SMALL, 0)


# ---- the command line ----


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--hidden-size", "4100"], 1, "--hidden-size 4100 does not divide into --num-heads 8"),
        (["--hidden-size", "520"], 1, "--hidden-size is 520: FP8 matrix products need a multiple of 16"),
        (["--hidden-size", "48", "--num-heads", "8"], 1, "the output of qkv_proj is 72"),
        (["--hidden-size", "1048576"], 1, "GiB of memory are needed"),
        (["--recipes", "row,fp4"], 2, "unknown recipe 'fp4'; here are delayed, current"),
        (["--recipes", ""], 2, "unknown recipe ''"),
        (["--tokens", "0"], 2, "must be at least 1"),
        (["--text", "/does/not/exist"], 1, "cannot read the text /does/not/exist"),
        (["--device", "cuda"], 1, "no GPU found"),
        (["--model", "/does/not/exist"], 1, "no model '/does/not/exist'"),
    ],
)
def test_bad_input_is_one_line_before_any_work(flags, status, message, monkeypatch, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr("sys.argv", ["fp8_quant.py", "--device", "cpu", *flags])
    monkeypatch.setattr(fp8_quant, "load_model", lambda *_: pytest.fail("work has started"))
    with pytest.raises(SystemExit) as stopped:
        fp8_quant.cli.run(fp8_quant.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == status and message in err
    assert "Traceback" not in err and (status == 2 or (out == "" and err.count("\n") == 1))
