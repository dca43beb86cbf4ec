"""Families of open weights, one module each."""
