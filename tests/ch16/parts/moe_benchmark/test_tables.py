from ch16.parts.moe_benchmark.tables import validation_rows


def test_errors_of_a_prediction():
    predicted = {"tokens_per_s": 110.0, "decode_step_ms": 9.0, "prefill_s": 1.0}
    measured = {"tokens_per_s": 100.0, "itl_p50_ms": 10.0, "prefill_s": 1.0}
    assert [round(row["error_percent"]) for row in validation_rows(predicted, measured)] == [10, -10, 0]
