"""Many runs in one table, from their result.json files alone: no torch."""
