"""The exact table of a teacher's logits: its file, its key, how it is filled and read, and when it pays."""
