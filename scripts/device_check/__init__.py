"""Check on a machine that what makes kdbench fast changes nothing, and time it against the goals."""
