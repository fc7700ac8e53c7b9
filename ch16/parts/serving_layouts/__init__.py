"""What serving_layouts.py is made of: flags and sizes, the processes of a layout, tables and claims, pictures."""
