"""Instruction sets answered by a decoder and scored by a judge: just-eval and mt-bench."""
