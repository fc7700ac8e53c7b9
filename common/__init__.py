"""Helpers shared by the scripts of chapter 16. This package imports no script."""
