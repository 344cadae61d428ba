"""Tables of rows that are cut over the ranks, of which a training step touches a few."""

from s3rec_dist.tables.sharded import ShardedTable as ShardedTable
from s3rec_dist.tables.sharded import TableSpec as TableSpec
