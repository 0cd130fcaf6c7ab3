"""What one run is: its recipe, its stages, its folder, its teacher, and its life from start to result."""
