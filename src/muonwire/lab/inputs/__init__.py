"""What claims are measured on: matrices of real training, and finished training runs."""
