"""A release beside what other tools made of it: whether that is this release in another form, and what is left."""
