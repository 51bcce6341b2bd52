"""Plain PyTorch: every operator as a short function, every model as a short module. The specification in code."""
