"""Data sets: reading, checking, preparing, sampling, and the synthetic sample."""
