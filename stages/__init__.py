"""The pipeline: one short script for each DVC stage."""
