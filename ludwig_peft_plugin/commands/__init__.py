"""Commands of `ludwig-peft` that are more than a few lines."""
