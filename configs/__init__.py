"""Runs, as Python modules: each has a `config = Config(...)` and says how many tokens it reads."""
