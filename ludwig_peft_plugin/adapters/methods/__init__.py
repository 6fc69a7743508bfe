"""The adapter types, one file each. A file added here is found by itself and registers what it defines."""
