"""Kill, fill up and damage runs of kdbench, and count what is lost and what is wrong."""
