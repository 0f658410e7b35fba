"""muonwire in the training loops of others: one module for each, which imports its framework."""
