"""Many trainings and what they come to: `python -m dlrm_example.sweep`."""
