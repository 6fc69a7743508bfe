"""Triton kernels for what a GPU would otherwise do in many passes over memory; each has a plain reference beside it."""
