"""A fleet: workers in their places, what is asked of them, and what becomes of them; wherever they run."""
