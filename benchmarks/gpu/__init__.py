"""Fine-tuning speed and memory on one GPU: this plugin, stock Ludwig, TRL and Unsloth on the same model and rows."""
