"""Training loops, what they record, and the figures they leave."""
