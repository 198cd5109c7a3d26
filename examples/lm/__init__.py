"""The parts of examples/train_lm.py: text, models, training loop, pictures."""
