"""Parts of gpu_acceptance.py. Each module but `summary` and `runner` is a script of its own, run in a process of its own."""
