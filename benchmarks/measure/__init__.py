"""What `gpu.py` measures and how: one module for each concern, the command itself beside them."""
