"""Datasets: registered, read, checked, generated."""
