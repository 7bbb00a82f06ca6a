"""The drawings of the report."""
