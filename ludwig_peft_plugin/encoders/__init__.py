"""Adapters of the text encoders of ordinary Ludwig models (`model_type: ecd`)."""
