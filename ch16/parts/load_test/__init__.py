"""What load_test.py is made of: flags and sizes, the server to test, tables and claim, the picture."""
