"""What inference_serving.py is made of: flags, tables, the picture, the server process and the layer around it."""
