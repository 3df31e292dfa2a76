"""Which tokens stay, and how well they are stored, under one budget."""
