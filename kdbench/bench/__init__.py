"""How fast a configuration trains on this machine, how fast it could, and how fast the plain loop is."""
