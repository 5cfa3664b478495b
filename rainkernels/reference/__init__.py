"""reference of rainkernels, one module per kernel family."""
