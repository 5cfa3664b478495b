// edits on the CPU.   Reference: rainkernels/reference/edits.py
