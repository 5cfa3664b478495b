"""Parts of bench_kernels.py: how to measure (`measure`), what one comparison is (`bench`), and one module per kernel family."""
