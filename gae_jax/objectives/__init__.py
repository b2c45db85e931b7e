"""What the tokenizer is trained on: terms, weights, targets and discriminators."""
