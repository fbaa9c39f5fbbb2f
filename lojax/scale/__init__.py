"""Many chips: shardings of adapters and optimizer state, the traffic of a program, and plans before renting."""

from lojax.scale.agree import check_agreement
from lojax.scale.collectives import traffic
from lojax.scale.plan import plan, search
from lojax.scale.shardings import Shardings, init_sharded, shardings

__all__ = ["Shardings", "check_agreement", "init_sharded", "plan", "search", "shardings", "traffic"]
