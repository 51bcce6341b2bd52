"""What the commands `prepare` and `check` do."""
