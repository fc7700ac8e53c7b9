"""What `inference_serving.py --serve` adds to vLLM's OpenAI-compatible server.

process.py   the port, an answer while the model loads, vLLM's server until a signal stops it
layer.py     the ASGI middleware around that server: admission, drain, metrics
bodies.py    what may stand in a request, and /generate in terms of /v1/completions
asgi.py      ASGI in small pieces
"""
