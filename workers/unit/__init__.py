"""One unit of work, from fetched to staged."""
