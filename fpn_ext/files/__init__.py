"""Files: written atomically, and read without executing code in them."""
