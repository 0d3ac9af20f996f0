"""What the command line does: run, merge, plan, watch."""
