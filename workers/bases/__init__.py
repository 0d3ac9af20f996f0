"""What a base is: its modules, and the forms its weights are stored in."""
