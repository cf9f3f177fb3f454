"""The steps that bring a database's tables from any earlier version to this one's; run by alembic."""
