"""Single operators: the cases that are measured, other implementations, forms on a CPU."""
