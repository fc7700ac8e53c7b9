"""What inference_serving.py is made of.

flags.py     the command line, and how much work it means
tables.py    columns and claims; picture.py draws them
process.py   the server's port, an answer while the model loads, vLLM's server until a signal stops it
layer.py     the ASGI middleware around that server: admission, drain, metrics
bodies.py    what may stand in a request, and /generate in terms of /v1/completions
asgi.py      ASGI in small pieces
"""
