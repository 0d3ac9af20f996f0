"""Alembic's migrations of the ledger, one file for each schema."""
