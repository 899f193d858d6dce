"""Runs, as Python modules: each defines `config`; its docstring says what it reads and costs."""
