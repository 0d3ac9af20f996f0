"""How a delta is computed. A lane reads an adapter's headers and says which base tensor gets which delta."""
