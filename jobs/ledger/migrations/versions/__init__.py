"""One migration each, named after the schema it leads to."""
