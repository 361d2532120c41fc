"""What prepares data, and what needs training, generation or matplotlib to score or draw.

Run as `python -m tools.NAME`.
"""
