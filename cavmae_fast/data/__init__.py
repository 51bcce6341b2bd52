"""Media files to tensors."""
