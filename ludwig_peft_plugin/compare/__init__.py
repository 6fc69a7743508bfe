"""`ludwig-peft compare`: train several adapter types on one dataset, each in a process of its own, and report."""
