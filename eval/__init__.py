"""Measuring a trained model: generation from held-out prompts, distances, reconstruction, and the report page."""
