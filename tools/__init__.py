"""What prepares data, and what needs training, generation or matplotlib to score or draw: run as `python -m tools.NAME`."""
