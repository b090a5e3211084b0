"""Diagnosis of an installation; needs only Python's standard library."""
