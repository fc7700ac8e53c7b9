import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.serving_layouts.plan import Layout, parse_layout, possible_layouts, problem, room_for
from common.gpu import Machine
from common.models import SHAPES

ROOT = Path(__file__).resolve().parents[4]
LARGE, TINY = SHAPES["deepseek-coder-33b"], SHAPES["tiny-llama"]
H100 = Machine("cuda", "H100", 8, 81559 * 2**20, 128, (9, 0), native_bf16=True, native_fp8=True)


def test_layouts_of_the_chapters_model():
    assert list(map(str, possible_layouts(LARGE, 8))) == ["8 x TP=1", "4 x TP=2", "2 x TP=4", "1 x TP=8"]
    assert list(map(str, possible_layouts(TINY, 2))) == ["2 x TP=1", "1 x TP=2"]
    assert parse_layout("2x4") == Layout(replicas=2, ranks=4)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 48), st.integers(1, 16))
def test_against_every_pair_of_numbers(kv_heads, group, mlp, devices):
    heads = kv_heads * group
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp}
    twin = {
        Layout(replicas, ranks)
        for replicas in range(1, devices + 1)
        for ranks in range(1, devices + 1)
        if replicas * ranks == devices and heads % ranks == mlp % ranks == 0
        if kv_heads % ranks == 0 or ranks % kv_heads == 0
    }
    found = possible_layouts(config, devices)
    assert set(found) == twin and len(found) == len(twin) and found[0] == Layout(devices, 1)


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x8", "8x-1", "axb", "2x2x2"])
def test_no_layouts(text):
    with pytest.raises(ValueError):  # argparse names the flag and the text
        parse_layout(text)


def test_processes():
    assert Layout(8, 1).processes == 1 + 8 * 2  # each replica: the API server, and the engine that computes itself
    assert Layout(2, 4).processes == 1 + 2 * (2 + 4)


def test_room_of_one_gpu_against_the_run_on_an_h100():
    """There was room for 303 sequences of 1,024 tokens, the run says."""
    content = json.loads((ROOT / "results" / "h100" / "inference_serving.json").read_text())
    measured = max(row["concurrency"] for row in content["tables"]["load"]["rows"])
    room = room_for(LARGE, Layout(1, 1), H100, fp8=True)
    assert room.tokens / 1024 == pytest.approx(measured, rel=0.05)


def test_room_by_hand():
    one, all_eight = (room_for(LARGE, layout, H100, fp8=False) for layout in (Layout(8, 1), Layout(1, 8)))
    assert one.weights == pytest.approx(2 * 33.343e9, rel=1e-4) and all_eight.weights == pytest.approx(one.weights / 8)
    a_token = 2 * 62 * 8 * 128 * 2  # K and V, layers, KV heads, their width, BF16
    assert one.tokens == 8 * int(one.cache // a_token) and all_eight.tokens == int(8 * all_eight.cache // a_token)
    fp8 = room_for(LARGE, Layout(8, 1), H100, fp8=True)
    assert fp8.weights == pytest.approx(33.343e9 + 2 * 32256 * 7168, rel=1e-4)  # embedding and head stay BF16


def test_ranks_beyond_the_kv_heads_hold_copies():
    config = LARGE | {"num_key_value_heads": 2}
    two, four = (room_for(config, Layout(1, ranks), H100, fp8=True) for ranks in (2, 4))
    assert four.tokens / two.tokens == pytest.approx(four.cache / two.cache)


@given(st.sampled_from([1, 2, 4]), st.integers(16, 200), st.booleans())
def test_what_does_not_fit_is_refused(ranks, memory, fp8):
    machine, layout = replace(H100, memory_bytes=memory * 2**30), Layout(8 // ranks, ranks)
    room = room_for(LARGE, layout, machine, fp8)
    each = room.tokens // layout.replicas
    assert bool(problem(LARGE, layout, machine, fp8, 4096)) == (each < 4096)


@pytest.mark.parametrize(
    ("layout", "memory", "text"),
    [
        (Layout(8, 2), 80, "it needs 16 devices, there are 8"),
        (Layout(1, 5), 80, "56 attention heads do not divide over 5 ranks"),
        (Layout(8, 1), 40, "62 GiB of weights on each device, of which 36 GiB can be used"),
        (Layout(8, 1), 74, "a KV cache of 2"),
        (Layout(8, 1), 80, ""),
    ],
)
def test_problems_in_words(layout, memory, text):
    found = problem(LARGE, layout, replace(H100, memory_bytes=memory * 2**30), False, 4096)
    assert found.startswith(text) and bool(found) == bool(text)


def test_what_does_not_divide_is_named():
    narrow = TINY | {"intermediate_size": 255}
    assert problem(narrow, Layout(1, 2), H100, False, 16) == "an MLP 255 wide does not divide over 2 ranks"


def test_a_model_of_unknown_size_is_not_refused():
    config = LARGE | {"model_type": "something-new"}
    assert room_for(config, Layout(8, 1), H100, fp8=True) is None and problem(config, Layout(8, 1), H100, True, 1) == ""
