"""What serving_layouts.py is made of: arithmetic of a layout, its processes, pictures."""
