"""ops of rainkernels, one module per kernel family."""
