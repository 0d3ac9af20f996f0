"""What an adapter changes in a base, found on the skeleton of its model."""
