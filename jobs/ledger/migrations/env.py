"""What Alembic runs to apply migrations: always on a connection that the ledger has opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
context.run_migrations()
