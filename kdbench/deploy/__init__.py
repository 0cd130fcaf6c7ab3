"""What comes after a training: a finished student loaded, asked, measured, and exported for other programs."""
