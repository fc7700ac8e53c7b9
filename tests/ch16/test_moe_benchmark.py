"""The chapter's layer, the script's claims, and its answers to bad input."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16 import moe_benchmark
from ch16.moe_benchmark import CHAPTER, SyntheticMoELayer, benchmark_moe, grouped, loop
from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, Routing, route
from ch16.parts.moe_benchmark.reference import TOLERANCE, reference
from ch16.parts.moe_benchmark.routing import PATTERNS, make_routing
from ch16.parts.moe_benchmark.sizes import sizes_for
from common.cli import CannotRun
from common.gpu import Peak, detect
from tests.ranks import torchrun

CPU = detect("cpu")


# ---- the layer ----


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8), st.sampled_from(["loop", "grouped"]), st.data())
def test_the_layer_is_router_and_experts(batch, sequence, experts, dispatch, data):
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(batch)
    layer = SyntheticMoELayer(16, experts, top_k, dispatch=dispatch, dtype=torch.float32)
    x = torch.randn(batch, sequence, 16)
    flat = x.reshape(-1, 16)
    expected = reference(flat, layer.experts, route(layer.router(flat), top_k)).view(x.shape)
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("config", CHAPTER)
def test_the_chapters_configurations(config):
    layer = SyntheticMoELayer(32, **config)
    assert layer.experts.w_in.shape == (config["num_experts"], 128, 32)
    assert layer(torch.randn(2, 3, 32, dtype=torch.bfloat16)).shape == (2, 3, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts_per_token": 5}, "5 experts per token, but there are 4"),
        ({"experts_per_token": 0}, "at least 1"),
        ({"num_experts": 0}, "at least 1"),
        ({"intermediate_size": 0}, "at least 1"),
        ({"dispatch": "magic"}, "dispatch must be one of loop, grouped, fp8"),
        ({"dispatch": "fp8"}, "needs a GPU"),
    ],
)
def test_impossible_layers(arguments, message):
    with pytest.raises(CannotRun, match=message):
        SyntheticMoELayer(16, **{"num_experts": 4, "experts_per_token": 2} | arguments)


def test_no_tokens():
    with pytest.raises(CannotRun, match="zero tokens"):
        SyntheticMoELayer(16, 4, 2)(torch.randn(1, 0, 16, dtype=torch.bfloat16))


# ---- dispatch ----


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@st.composite
def cases(draw):
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = ExpertSizes(draw(st.sampled_from([8, 24])), draw(st.sampled_from([4, 16])), experts, draw(st.booleans()))
    x = torch.randn(tokens, sizes.hidden, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])))
    routing = make_routing(draw(st.sampled_from(PATTERNS)), tokens, experts, top_k, seed=tokens)
    return x, Experts.random(sizes, dtype=x.dtype), routing


@given(cases(), st.sampled_from([loop, grouped]))
def test_every_dispatch_is_the_weighted_sum_of_exactly_the_chosen_experts(case, dispatch):
    x, experts, routing = case
    limit = TOLERANCE if x.dtype == torch.bfloat16 else 1e-5
    assert relative_error(dispatch(x, experts, routing), reference(x, experts, routing)) < limit


@given(cases(), st.sampled_from([loop, grouped]), st.randoms())
def test_permuting_tokens_permutes_outputs(case, dispatch, random):
    x, experts, routing = case
    order = list(range(len(x)))
    random.shuffle(order)
    shuffled = dispatch(x[order], experts, Routing(routing.experts[order], routing.weights[order]))
    assert torch.allclose(shuffled.float(), dispatch(x, experts, routing)[order].float(), rtol=0.05, atol=1e-2)


@given(cases())
def test_experts_nobody_chose_do_not_matter(case):
    """Their weights may be anything, even NaN."""
    x, experts, routing = case
    unused = torch.ones(experts.sizes.experts, dtype=torch.bool)
    unused[routing.experts.flatten()] = False
    before = grouped(x, experts, routing)
    experts.w_in[unused], experts.w_out[unused] = float("nan"), float("nan")
    assert torch.equal(grouped(x, experts, routing), before)
    assert torch.isfinite(loop(x, experts, routing)).all()


# ---- the measurement ----


def test_a_row():
    preset = moe_benchmark.Preset("small", 32, 64, 8, 2)
    sizes = sizes_for(CPU, quick=True)
    row = benchmark_moe(preset, Experts.random(preset.sizes), 24, CPU, sizes, seed=0)
    assert row["tokens_per_s"] == pytest.approx(24 / (row["grouped_ms"] / 1e3))
    assert row["tflops"] == pytest.approx(2 * 48 * 3 * 32 * 64 / (row["grouped_ms"] / 1e3) / 1e12)
    assert row["over_loop"] == pytest.approx(row["loop_ms"] / row["grouped_ms"])
    assert "compute_limit_ms" not in row and "fp8_ms" not in row  # unknown peaks, no FP8 units

    known = replace(CPU, peak=Peak(bf16_flops=1e9, bytes_per_s=1e8))
    row = benchmark_moe(preset, Experts.random(preset.sizes), 24, known, sizes, seed=0)
    moved = 2 * (row["active_experts"] * 3 * 32 * 64 + 2 * 24 * 32)  # weights of experts with tokens; tokens in and out
    assert row["compute_limit_ms"] == pytest.approx(1e3 * 2 * 48 * 3 * 32 * 64 / 1e9)
    assert row["memory_limit_ms"] == pytest.approx(1e3 * moved / 1e8)
    assert row["gb_per_s"] == pytest.approx(moved / (row["grouped_ms"] / 1e3) / 1e9)
    slower = max(row["compute_limit_ms"], row["memory_limit_ms"])
    assert row["limit_percent"] == pytest.approx(100 * slower / row["grouped_ms"])


def test_a_dispatch_that_is_wrong_is_not_timed(monkeypatch):
    preset = moe_benchmark.Preset("small", 32, 64, 8, 2)
    monkeypatch.setitem(moe_benchmark.DISPATCH, "grouped", lambda x, experts, routing: 1.1 * x)
    with pytest.raises(CannotRun, match="grouped dispatch is wrong by"):
        benchmark_moe(preset, Experts.random(preset.sizes), 24, CPU, sizes_for(CPU, quick=True), seed=0)


# ---- the script ----


def test_weights_belong_to_the_module():
    layer = SyntheticMoELayer(16, 4, 2)
    assert {"router.weight", "experts.w_in", "experts.w_out"} == set(layer.state_dict())
    assert layer.to(torch.float64).experts.w_in.dtype == torch.float64


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--tokens", "0,64"], 1, "--tokens 0: there is nothing to route"),
        (["--tokens", "many"], 1, "--tokens takes numbers"),
        (["--hidden-size", "4000000"], 1, "GiB for its weights"),
        (["--preset", "deepseek-v3", "--target-tok-s", "9"], 2, "needs a whole model"),
        (["--preset", "gpt-5"], 2, "invalid choice"),
        (["--preset", "small-moe", "--hidden-size", "64"], 2, "a --preset has its own width"),
        (["--link-gb-s", "-3"], 2, "must be above 0"),
        (["--device", "cuda"], 1, "no GPU found"),
        (["--model", "/nowhere"], 1, "no model '/nowhere'"),
        (["--model", "bundled"], 1, "is no mixture of experts"),
    ],
)
def test_bad_input_is_one_line(flags, status, message, monkeypatch, capsys):
    if "cuda" in flags and detect().device == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["moe_benchmark.py", "--quick", "--device", "cpu", *flags])
    monkeypatch.setattr(moe_benchmark, "measure_layers", lambda *_: pytest.fail("work has started"))
    with pytest.raises(SystemExit) as stopped:
        moe_benchmark.cli.run(moe_benchmark.main)
    error = capsys.readouterr().err
    assert stopped.value.code == status and message in error
    assert status == 2 or (error.startswith("error: ") and error.count("\n") == 1)


@pytest.mark.parametrize(
    ("flags", "routed"), [([], "64 gated experts, top-8"), (["--preset", "small-moe"], "small-moe")]
)
def test_routing_is_measured_on_the_layer_that_was_asked_for(flags, routed, tmp_path, monkeypatch, capsys):
    """And a plan that needs too much memory takes nothing from what was measured before."""

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore lines")

    monkeypatch.setattr(moe_benchmark, "measure_layers", lambda *_: [])
    monkeypatch.setattr(moe_benchmark, "measure_capacity", too_much)
    file = tmp_path / "moe.json"
    fixed = ["moe_benchmark.py", "--quick", "--device", "cpu", "--tokens", "8", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*fixed, *flags])
    assert moe_benchmark.main() == 0
    content = json.loads(file.read_text())
    routing = content["tables"]["routing"]
    assert routing["title"].startswith(f"What routing costs, {routed}, grouped") and len(routing["rows"]) == 4
    experts = len(routing["rows"][0]["load"])
    assert experts == (moe_benchmark.PRESETS["small-moe"].experts if flags else 64)
    assert content["settings"]["preset"] == (flags[1] if flags else None) and content["settings"]["model"] is None
    m1, m2 = content["claims"]
    assert m1["verdict"] == "n/a" and m2["claim"] == "M2"
    assert m1["reason"] == "the plan ran out of GPU memory: CUDA out of memory. Tried to allocate 9 GiB."
    assert "More lines" not in capsys.readouterr().out


def launch(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_experts_spread_over_processes(tmp_path):
    flags = ("--quick", "--device", "cpu", "--tokens", "8,64", "--hidden-size", "64")
    done = torchrun(4, moe_benchmark.__file__, *flags, "--json", str(tmp_path / "ranks.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Claims of the chapter") == 1
    rows = json.loads((tmp_path / "ranks.json").read_text())["tables"]["ranks"]["rows"]
    assert len(rows) == 2 * 4 and all(row["error"] < 0.02 and row["step_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_experts_that_do_not_divide():
    done = torchrun(3, moe_benchmark.__file__, "--quick", "--device", "cpu")
    assert done.returncode != 0 and done.stderr.count("error: 64 experts do not divide by 3 ranks") == 1
    assert "ch16/parts/moe_benchmark" not in done.stderr.replace("ch16/moe_benchmark.py", "")  # no traceback of ours


@pytest.mark.slow
def test_the_plan_is_checked_against_the_engine(tmp_path):
    """The real vLLM runs the whole model; how near the prediction comes is a result, not a test."""
    flags = ("--preset", "small-moe", "--tokens", "8", "--sequences", "4", "--json", str(tmp_path / "moe.json"))
    done = launch(moe_benchmark.__file__, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "moe.json").read_text())
    plan, validation = (content["tables"][name]["rows"] for name in ("plan", "validation"))
    throughput = validation[0]
    assert throughput["predicted"] == plan[0]["tokens_per_s"] and all(row["measured"] > 0 for row in validation)
    assert throughput["error_percent"] == pytest.approx(100 * (throughput["predicted"] / throughput["measured"] - 1))
    (m1,) = (claim for claim in content["claims"] if claim["claim"] == "M1")
    assert m1["verdict"] == ("holds" if abs(throughput["error_percent"]) <= 15 else "fails")


@pytest.mark.slow
def test_a_trained_checkpoint(tmp_path):
    """A tiny one with random weights: its routers are read, its load is measured, M2 is judged by it."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    from common.models import bundled

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=8, vocab_size=49152)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(bundled().path).save_pretrained(tmp_path / "tiny")
    flags = ("--quick", "--device", "cpu", "--tokens", "8,64", "--hidden-size", "64", "--model", str(tmp_path / "tiny"))
    done = launch(moe_benchmark.__file__, *flags, "--json", str(tmp_path / "moe.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    tables = json.loads((tmp_path / "moe.json").read_text())["tables"]
    assert len(tables["trained"]["rows"]) == 2
    assert any(row["pattern"] == "trained, most uneven" for row in tables["routing"]["rows"])
    assert "M2" in done.stdout and "trained, " in done.stdout.split("Claims of the chapter")[1]
