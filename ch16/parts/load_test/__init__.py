"""What load_test.py is made of: the search for the knee, the picture."""
