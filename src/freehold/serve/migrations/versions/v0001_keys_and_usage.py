"""API keys, and what each used on each day."""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the first tables. Written out, not taken from database.py: a step stays as it was when tables change."""
    op.create_table(
        "api_keys",
        sql.Column("id", sql.String(16), primary_key=True),
        sql.Column("secret_sha256", sql.LargeBinary(32), nullable=False),
        sql.Column("name", sql.String(100), nullable=False),
        sql.Column("scopes", sql.String(100), nullable=False),
        sql.Column("expires_at", sql.DateTime(timezone=True)),
        sql.Column("requests_per_minute", sql.BigInteger),
        sql.Column("concurrency", sql.BigInteger),
        sql.Column("tokens_per_day", sql.BigInteger),
        sql.Column("weight", sql.Float(53), nullable=False),
        sql.Column("created_at", sql.DateTime(timezone=True), nullable=False),
        sql.Column("revoked_at", sql.DateTime(timezone=True)),
    )
    op.create_table(
        "key_usage",
        sql.Column("key_id", sql.String(16), sql.ForeignKey("api_keys.id"), primary_key=True),
        sql.Column("day", sql.Date, primary_key=True),
        sql.Column("num_requests", sql.BigInteger, nullable=False, server_default="0"),
        sql.Column("prompt_tokens", sql.BigInteger, nullable=False, server_default="0"),
        sql.Column("completion_tokens", sql.BigInteger, nullable=False, server_default="0"),
        sql.Column("reserved_tokens", sql.BigInteger, nullable=False, server_default="0"),
    )
