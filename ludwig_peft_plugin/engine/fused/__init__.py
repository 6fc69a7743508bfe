"""Llama-like decoder layers with LoRA, written as three autograd functions that keep only what cannot be recomputed."""
