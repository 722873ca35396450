"""What the rows of a run must be: formats, tokens and labels."""
