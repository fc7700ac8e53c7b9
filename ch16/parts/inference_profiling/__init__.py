"""The pieces of `ch16/inference_profiling.py`: traces read, time attributed, work counted, decoding in four ways."""
