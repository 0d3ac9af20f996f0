"""The driver: which jobs go to which workers, and what becomes of them. No Ray."""
