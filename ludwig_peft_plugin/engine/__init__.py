"""How rows go through a model in training: padding-free attention, fused layers and a loss without full logits."""
