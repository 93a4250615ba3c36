"""Using trained models: load, predict, export."""
