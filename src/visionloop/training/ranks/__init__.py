"""A training in several processes: who starts them, how they meet, and how a failure of one is told."""
