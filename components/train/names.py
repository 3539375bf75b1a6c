"""Beginnings of the names of what training logs."""

LOSS = "loss/"
NORM = "grad_norm/"
