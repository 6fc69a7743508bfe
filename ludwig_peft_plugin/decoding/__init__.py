"""Generation of many answers at once: rows in the slots of one key-value cache, refilled as answers end."""
