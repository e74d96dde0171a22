"""The sliding-window recurrence: one entry point per backend, `block_two_pass`."""
