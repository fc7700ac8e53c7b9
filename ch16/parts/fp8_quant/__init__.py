"""The pieces of `ch16/fp8_quant.py`: number formats and scaling, layers with FP8 weights, accuracy of a real model."""
