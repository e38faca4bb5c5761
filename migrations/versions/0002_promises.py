"""What the gate, the settling of doubt and the doors for messages add to the tables.

Revision: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # How many of its addresses lie outside the organisation: the tenant's limit counts them.
    op.add_column("messages", sa.Column("external", sa.SmallInteger(), nullable=True))
    op.add_column("attempts", sa.Column("external", sa.SmallInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "external")
    op.drop_column("messages", "external")
