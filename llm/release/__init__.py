"""Release of a model: its lineage card outside the pipeline, the check of its digests, the gate."""
