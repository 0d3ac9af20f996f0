"""Bulk request files become merge requests, or every mistake in them at once."""
