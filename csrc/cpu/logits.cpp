// logits on the CPU.   Reference: rainkernels/reference/logits.py
