"""Several named adapters on one base: attached, merged, switched, saved and loaded."""
