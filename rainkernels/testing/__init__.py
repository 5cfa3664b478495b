"""testing of rainkernels, one module per kernel family."""
