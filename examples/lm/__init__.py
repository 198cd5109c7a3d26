"""The parts of the examples: text, models, training loop, recall task, pictures."""
