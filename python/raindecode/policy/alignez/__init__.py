"""AlignEZ: directions between helpful and harmful activations, and edits of hidden states along them."""
