"""The parts of a phase sum to the phase, whatever lies in it; names of real kernels and operators are known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.inference_profiling.attribution import GAPS, KINDS, Profile, kind_of, time_by_kind, top_operations
from ch16.parts.inference_profiling.trace import Event, Trace
from common.cli import CannotRun

PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, _ = KINDS


def trace_of(ops=(), kernels=()):
    def by_start(events):
        return sorted(events, key=lambda event: event.start)

    return Trace(by_start(ops), by_start(kernels), [], [])


SPAN = Event("phase", 10.0, 20.0, 1)


def test_operators_without_those_they_call():
    """linear 11..15 calls mm 12..14; add 16..17: two seconds of products, two of linear's own, five of nothing."""
    ops = [Event("aten::linear", 11, 15, 1), Event("aten::mm", 12, 14, 1), Event("aten::add", 16, 17, 1)]
    ops += [Event("aten::mul", 11, 19, 2), Event("aten::mul", 21, 22, 1)]  # another thread, another time
    assert time_by_kind(trace_of(ops), SPAN) == {PRODUCTS: 4, ATTENTION: 0, ELEMENTWISE: 1, COPIES: 0, GAPS: 5}
    rows = top_operations(trace_of(ops), [SPAN], count=2)
    assert [(row["name"], row["ms"], row["calls"], row["percent"]) for row in rows] == [
        ("aten::linear", 2000, 1, 20),
        ("aten::mm", 2000, 1, 20),
    ]


def test_views_and_allocations_are_gaps():
    ops = [Event("aten::contiguous", 11, 13, 1), Event("aten::empty", 11, 12, 1)]
    assert time_by_kind(trace_of(ops), SPAN)[COPIES] == 1 and time_by_kind(trace_of(ops), SPAN)[GAPS] == 9


def test_kernels_that_overlap_count_once():
    """A product 12..15 and a copy 14..17 beside it; what begins before the phase or ends after it is cut."""
    kernels = [Event("nvjet_sm90", 12, 15), Event("Memcpy DtoD", 14, 17), Event("add_kernel", 5, 11)]
    kernels += [Event("flash_fwd", 19, 25), Event("flash_fwd", 30, 31), Event("nvjet_sm90", 12.5, 13)]
    times = time_by_kind(trace_of([Event("aten::mm", 10, 20, 1)], kernels), SPAN)
    assert times == {PRODUCTS: 3, COPIES: 2, ELEMENTWISE: 1, ATTENTION: 1, GAPS: 3}


NAMES = st.sampled_from(["aten::mm", "aten::add", "aten::copy_", "aten::view", "flash_fwd", "nvjet", "Memset"])


@given(st.lists(st.tuples(NAMES, st.floats(0, 30), st.floats(0, 9))))
def test_device_parts_always_sum_to_the_phase(kernels):
    times = time_by_kind(trace_of((), [Event(name, start, start + length) for name, start, length in kernels]), SPAN)
    assert sum(times.values()) == pytest.approx(SPAN.seconds) and min(times.values()) >= -1e-9


@st.composite
def nested(draw, start=10.0, end=20.0, depth=0):
    """Operators of one thread within start..end, as a call stack makes them."""
    events, at = [], start
    while depth < 4 and at < end and draw(st.booleans()):
        begin = draw(st.floats(at, end))
        stop = draw(st.floats(begin, end))
        events.append(Event(draw(NAMES), begin, stop, 1))
        events += draw(nested(begin, stop, depth + 1))
        at = stop
    return events


@given(nested())
def test_host_parts_always_sum_to_the_phase(ops):
    times = time_by_kind(trace_of(ops), SPAN)
    assert sum(times.values()) == pytest.approx(SPAN.seconds) and min(times.values()) >= -1e-9


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # transformers on an H100
        ("nvjet_sm90_tst_64x8_64x16_2x1_v_bz_splitK_TNT", PRODUCTS),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", PRODUCTS),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", PRODUCTS),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, MulFunctor>>",
            ELEMENTWISE,
        ),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::Tensor)>", COPIES),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>>", COPIES),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>", ATTENTION),
        ("Memcpy DtoD (Device -> Device)", COPIES),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", ELEMENTWISE),
        # vLLM there
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<", ATTENTION),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>", COPIES),
        ("triton_poi_fused_mul_silu_slice_1", ELEMENTWISE),
        # both on a CPU
        ("aten::mm", PRODUCTS),
        ("aten::addmm", PRODUCTS),
        ("_C::onednn_mm", PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("_C::cpu_attention_with_kv_cache", ATTENTION),
        ("_C::cpu_attn_reshape_and_cache", COPIES),
        ("graph_0_cpp_fused__scaled_dot_product_flash_attention_for_cpu__unsafe_view_add_0", ELEMENTWISE),
        ("aten::_to_copy", COPIES),
        ("aten::cat", COPIES),
        ("aten::silu", ELEMENTWISE),
        ("aten::as_strided", GAPS),
        ("aten::view", GAPS),
        ("TorchDynamo Cache Lookup", GAPS),
    ],
)
def test_kinds_of_real_names(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void at::native::elementwise_kernel<4, at::native::BinaryFunctor<float, at::native::MulFunctor<float>>>",
            "elementwise_kernel of MulFunctor",
        ),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::Opaque>", "CatArrayBatchedCopy"),
        ("nvjet_sm90_tst", "nvjet_sm90_tst"),
        ("x" * 99, "x" * 47 + "..."),
    ],
)
def test_names_in_a_table(name, short):
    assert top_operations(trace_of((), [Event(name, 11, 12)]), [SPAN])[0]["name"] == short


def profile_of(seconds, kernels=()):
    span = Event("decode", 10.0, 12.0, 1)
    return Profile.of(Trace([], list(kernels), [span], []), {"decode": seconds})


def test_parts_that_do_not_sum_to_the_wall_time():
    assert profile_of(2.03).checked_parts()["decode"][GAPS] == 2.0
    for seconds in (2.1, 1.9):
        with pytest.raises(CannotRun, match="the parts of decode sum to"):
            profile_of(seconds).checked_parts()


def test_work_of_the_device_outside_the_phases():
    """A kernel before the first phase is warm-up; one after the last belongs to it and was not waited for."""
    inside, before, after = Event("nvjet", 10.5, 11.5), Event("nvjet", 8, 9), Event("nvjet", 12, 12.5)
    assert profile_of(2.0, [before, inside]).checked_parts()["decode"]["matrix products"] == 1.0
    with pytest.raises(CannotRun, match=r"the device worked 1\.5000 s, but only 1\.0000 s are in the phases"):
        profile_of(2.0, [inside, after]).checked_parts()
