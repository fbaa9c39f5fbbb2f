"""Adapters and optimizer state on a mesh: shardings, sharded initialization, consistency between processes."""

from lojax.sharding.consistency import check_agreement
from lojax.sharding.shardings import Shardings, init_sharded, shardings

__all__ = ["Shardings", "check_agreement", "init_sharded", "shardings"]
